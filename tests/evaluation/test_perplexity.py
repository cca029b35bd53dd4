"""Perplexity by the published protocol, against its definition."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from elsa_lightning.errors import UserError
from elsa_lightning.evaluation import difference, perplexity, table
from elsa_lightning.lm.text import Source


@pytest.fixture(scope="module")
def model(tiny_llama: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def tokenizer(tiny_llama: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama, bos_token="<|endoftext|>")


@torch.no_grad()
def by_definition(model: Any, ids: torch.Tensor) -> float:
    logits = model(ids).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()))


def test_a_text_is_cut_into_segments_that_do_not_overlap(model: Any, tokenizer: Any, text_file: Path) -> None:
    found = perplexity(model, tokenizer, str(text_file), seq_len=48, segments=7)
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"])[: 7 * 48].view(7, 48)
    assert found.value == pytest.approx(by_definition(model, ids), rel=1e-5)
    assert found.protocol == f"{text_file}, 7 segments of 48 tokens, no BOS, float32" and found.count == 7
    whole = perplexity(model, tokenizer, str(text_file))
    assert whole.count == len(tokenizer(text_file.read_text())["input_ids"]) // 64  # the model takes no more
    assert whole.error is not None and found.error is not None and whole.error < found.error


def test_bos_goes_where_it_is_asked_for(model: Any, tokenizer: Any, text_file: Path) -> None:
    bos = tokenizer.bos_token_id
    assert bos is not None
    found = perplexity(model, tokenizer, str(text_file), seq_len=32, segments=3, bos="segment")
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"])[: 3 * 31].view(3, 31)
    ids = torch.cat([torch.full((3, 1), bos), ids], dim=1)
    assert found.value == pytest.approx(by_definition(model, ids), rel=1e-5)
    assert "BOS at each segment" in found.protocol
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="no"):
        perplexity(model, tokenizer, str(text_file), seq_len=32, bos="segment")


def test_documents_are_joined_with_two_newlines(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    words = ["A class is a type. " * 20, "A module is a file. " * 20]
    for place, document in enumerate(words):
        (tmp_path / f"{place}.txt").write_text(document)
    found = perplexity(model, tokenizer, str(tmp_path), seq_len=32)
    ids = torch.tensor(tokenizer("\n\n".join(words))["input_ids"])
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    assert found.value == pytest.approx(by_definition(model, ids), rel=1e-5)


def test_rows_without_text_are_left_out_and_counted(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    words = "A class is a type. " * 20
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (words, None, words)))
    with pytest.warns(UserWarning, match="1 of the 3 rows"):
        found = perplexity(model, tokenizer, str(tmp_path / "some.jsonl"), seq_len=32)
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (words, words)))
    assert found.value == perplexity(model, tokenizer, str(tmp_path / "all.jsonl"), seq_len=32).value
    (tmp_path / "none.jsonl").write_text(json.dumps({"text": None}))
    with pytest.warns(UserWarning, match="1 of the 1 rows"), pytest.raises(UserError, match="is empty"):
        perplexity(model, tokenizer, str(tmp_path / "none.jsonl"))


def test_completions_are_not_measured_without_their_prompts(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "Two and two?", "completion": " Four, which is two and two."})
    (tmp_path / "a.jsonl").write_text("\n".join([row] * 50))
    with pytest.raises(UserError, match="which elsa test measures"):
        perplexity(model, tokenizer, str(tmp_path / "a.jsonl"), seq_len=32)


def test_the_tokenizer_that_is_given_is_used_for_texts_with_names(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not another one that is loaded from where it once came from."""
    monkeypatch.setattr(Source, "evaluation_text", lambda source, split: "A class is a type. " * 50)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    plain = perplexity(model, tokenizer, "pydocs", seq_len=32, segments=3)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.name_or_path = "nowhere"
    found = perplexity(model, tokenizer, "pydocs", seq_len=32, segments=3)
    assert "no BOS" in plain.protocol and "BOS once, at the beginning" in found.protocol


def test_a_broken_model_is_not_one_of_infinite_perplexity(tokenizer: Any, text_file: Path, tiny_llama: str) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    broken.get_input_embeddings().weight.data.fill_(math.nan)
    found = perplexity(broken, tokenizer, str(text_file), seq_len=48, segments=2)
    assert math.isnan(found.value) and "nan" in table([found]) and "inf" not in table([found])


def test_models_are_compared_segment_by_segment(model: Any, tokenizer: Any, text_file: Path, tiny_llama: str) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    one, two = (perplexity(m, tokenizer, str(text_file), seq_len=48) for m in (model, other))
    found = difference(two, one)
    assert found.how == "paired" and found.error is not None and two.error is not None
    assert found.error < math.hypot(two.error, one.error or 0) / 2
    assert difference(one, one).error == 0
    other.train()
    other.model.eval()
    perplexity(other, tokenizer, str(text_file), segments=1)
    assert other.training and not other.model.training and not model.training  # as they were
    shifted = AutoTokenizer.from_pretrained(tiny_llama)
    shifted.add_tokens(["the"])  # which cuts other segments
    assert difference(two, perplexity(model, shifted, str(text_file), seq_len=48)).how == "independent"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 65}, "from 2 to the 64 tokens that the model can take, got 65"),
        ({"seq_len": 1}, "got 1"),
        ({"segments": 0}, "segments must be 1 or more"),
        ({"bos": "often"}, "bos must be one of"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], message: str, model: Any, tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        perplexity(model, tokenizer, str(text_file), **options)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match="not one segment of 64"):
        perplexity(model, tokenizer, str(tmp_path / "short.txt"))
