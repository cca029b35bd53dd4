"""What the model writes, dense and sparse, on the same prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback
from elsa_lightning.callbacks import Samples, SaveHuggingFace
from elsa_lightning.callbacks.journal import JOURNAL
from elsa_lightning.errors import UserError

from .tiny import Net, loader, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def fit(folder: Path, model: str, cache: str, *callbacks: Any, resume: Path | None = None, **options: Any) -> CausalLM:
    seed_everything(1, verbose=False)
    data = CalibrationData(seq_len=32, batch_size=4, eval_segments=6, train_sequences=60, cache_dir=cache)
    module = CausalLM(model)
    saver = ModelCheckpoint(folder, "{step}", auto_insert_metric_name=False, every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(folder, ElsaCallback(sparsity=0.9), *callbacks, saver, max_steps=4, **options)
    trainer.fit(module, data, ckpt_path=resume)
    return module


def written(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What plain transformers makes of a prompt."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                                 pad_token_id=0)  # fmt: skip
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_texts_are_those_of_both_models_and_the_run_is_the_same(
    tiny_llama: str, token_cache: str, tmp_path: Path
) -> None:
    samples = Samples(new_tokens=12)
    with_them = fit(tmp_path, tiny_llama, token_cache, samples, SaveHuggingFace(str(tmp_path / "hf")))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    models = {"dense": tiny_llama, "sparse": tmp_path / "hf"}
    assert len(samples.samples) == 3
    for by, place in models.items():
        model = AutoModelForCausalLM.from_pretrained(place)
        for sample in samples.samples:
            assert sample[by] == written(model, tokenizer, sample["prompt"], 12)
    assert json.loads((tmp_path / JOURNAL).read_text())["samples"] == samples.samples
    without = fit(tmp_path / "without", tiny_llama, token_cache)
    for one, other in zip(with_them.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_run_has_the_texts_of_the_dense_model(tiny_llama: str, token_cache: str, tmp_path: Path) -> None:
    whole, resumed = Samples(["The list"], new_tokens=8), Samples(["The list"], new_tokens=8)
    fit(tmp_path, tiny_llama, token_cache, whole)
    fit(tmp_path / "again", tiny_llama, token_cache, resumed, resume=tmp_path / "2.ckpt")
    assert resumed.samples == whole.samples and whole.samples[0].keys() == {"prompt", "dense", "sparse"}


class FullDisk(SaveHuggingFace):
    """A save that fails when the run is over."""

    def _write(self, *_: Any) -> str:
        raise OSError("No space left on device")


def test_a_run_whose_export_failed_is_completed_by_resuming_it(
    tiny_llama: str, token_cache: str, tmp_path: Path
) -> None:
    texts = Samples(["The list"], new_tokens=8), Samples(["The list"], new_tokens=8)
    whole = fit(tmp_path / "whole", tiny_llama, token_cache, texts[0], SaveHuggingFace(str(tmp_path / "whole/hf")))
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, tiny_llama, token_cache, Samples(["The list"], new_tokens=8), FullDisk(str(tmp_path / "hf")))
    assert json.loads((tmp_path / JOURNAL).read_text())["status"] == "failed" and not (tmp_path / "hf").exists()
    saver = SaveHuggingFace(str(tmp_path / "hf"))
    resumed = fit(tmp_path, tiny_llama, token_cache, texts[1], saver, resume=tmp_path / "4.ckpt")
    assert resumed.final_perplexity == whole.final_perplexity and texts[1].samples == texts[0].samples
    model = "model.safetensors"
    assert (tmp_path / "hf" / model).read_bytes() == (tmp_path / "whole" / "hf" / model).read_bytes()
    journals = sorted(tmp_path.glob("elsa_run*.json"))
    assert len(journals) == 2
    first, second = (json.loads(file.read_text()) for file in (tmp_path / "whole" / JOURNAL, journals[1]))
    assert second["status"] == "finished" and second["record"]["perplexity"] == first["record"]["perplexity"]
    assert second["record"]["method"] == first["record"]["method"] and second["tensors"] == first["tensors"]


def test_prompts_as_long_as_the_model_takes_are_left_out(tiny_llama: str, token_cache: str, tmp_path: Path) -> None:
    samples = Samples(["word " * 200, "The list"])
    with pytest.warns(UserWarning, match="nothing can be added to the prompt"):
        fit(tmp_path, tiny_llama, token_cache, samples)
    assert samples.samples[0].keys() == {"prompt"} and "sparse" in samples.samples[1]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be 1 or more"):
        Samples(new_tokens=0)
    with pytest.raises(UserError, match="Samples needs a Hugging Face model that generates"):
        make_trainer(tmp_path, ElsaCallback(sparsity=0.9), Samples(), max_steps=2).fit(Net(), loader())
