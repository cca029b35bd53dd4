"""Local text of every kind: splits by name, evaluation text, columns, conversations, and what is scored."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import AutoTokenizer

from elsa_lightning import CalibrationData, CausalLM
from elsa_lightning.errors import UserError
from elsa_lightning.lm import EMBEDDED_MODEL, model_path
from elsa_lightning.lm.chat import encode
from elsa_lightning.lm.data import PackedTokens
from elsa_lightning.lm.local import Split
from elsa_lightning.lm.local import rows as read
from elsa_lightning.lm.packing import EvaluationShare

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% generation %}{{ m['content'] }}</assistant>"
    "{% endgeneration %}{% else %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A sequence of values."},
    {"role": "user", "content": "And a set?"},
    {"role": "assistant", "content": "Values without an order."},
]


@pytest.fixture(scope="module")
def words() -> Any:
    return AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))


@pytest.fixture
def chat(tmp_path: Path, words: Any) -> Any:
    """Folder of a tokenizer with a chat template."""
    words = AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))
    words.chat_template = TEMPLATE
    words.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")


def opened(stage: str = "fit", **options: Any) -> CalibrationData:
    data = CalibrationData(**{"seq_len": 8, "batch_size": 1, **options})
    for split in ("train", "validation", "test"):
        data._tokens(split)
    data.setup(stage)
    return data


def texts(data: CalibrationData, words: Any) -> dict[str, str]:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    return {split: words.decode(data._tokens(split)).replace(words.eos_token, "|") for split in splits}


def write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


LONG = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu "


@pytest.mark.parametrize(
    "names",
    [
        ("train/a.txt", "validation/a.txt", "test/a.txt"),
        ("train.txt", "valid.txt", "test.txt"),
        ("train-00000-of-00001.txt", "val-0.txt", "test-0.txt"),
        ("wiki.train.raw.txt", "wiki.dev.raw.txt", "wiki.test.raw.txt"),
        ("a/my_train.txt", "a/my_eval.txt", "a/my_test.txt"),
        ("rest.txt", "dev.txt", "Test/x.txt"),
    ],
)
def test_splits_are_respected_by_name(names: tuple[str, ...], tmp_path: Path, token_cache: str, words: Any) -> None:
    folder = tmp_path / "corpus"
    for name, word in zip(names, ("train", "check", "final"), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{word} {LONG}")
    found = texts(opened(name=str(folder), cache_dir=token_cache), words)
    assert found == {
        "train": f"train {LONG}|", "validation": f"check {LONG}|", "test": f"final {LONG}|"
    }  # fmt: skip


def test_one_evaluation_split_stands_for_both_and_words_in_the_middle_mean_nothing(
    tmp_path: Path, token_cache: str, words: Any
) -> None:
    for name in ("train", "test"):
        (tmp_path / "two" / f"{name}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "two" / f"{name}.txt").write_text(f"{name} {LONG}")
    found = texts(opened(name=str(tmp_path / "two"), cache_dir=token_cache), words)
    assert found["validation"] == found["test"] == f"test {LONG}|" and "test" not in found["train"]
    for name in ("how-to-train-dragons", "a-test-of-time"):
        (tmp_path / "books" / f"{name}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / "books" / f"{name}.txt").write_text(f"{name} {LONG * 20}")
    data = opened(name=str(tmp_path / "books"), cache_dir=token_cache)
    assert data.source.is_cut and "test" in words.decode(data._tokens("train"))


def test_evaluation_text_is_used_whole_and_the_training_text_too(tmp_path: Path, token_cache: str, words: Any) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} {LONG * 30}end")
    named = {"name": str(tmp_path / "a.txt"), "eval_name": str(tmp_path / "b.txt"), "cache_dir": token_cache}
    found = texts(opened(**named), words)
    assert found["train"] == f"a {LONG * 30}end|"
    assert found["validation"] == found["test"] == f"b {LONG * 30}end|"
    among = texts(opened(**{**named, "name": str(tmp_path)}), words)  # even where it lies there
    assert among == found
    same = opened(name=str(tmp_path / "a.txt"), eval_name=f"{tmp_path}/../{tmp_path.name}/a.txt", cache_dir=token_cache)
    assert same.source.is_cut  # the same text cannot be both: its last tenth is held out
    with pytest.raises(UserError, match=r"has no train text, all of it is what data\.eval_name evaluates on"):
        CalibrationData(named["name"], eval_name=str(tmp_path))


def test_a_folder_that_only_evaluates_is_no_training_text(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(LONG)
    with pytest.raises(UserError, match=r"has no train text, what it holds is named test"):
        CalibrationData(str(tmp_path))
    assert CalibrationData(eval_name=str(tmp_path)).eval_source.part("validation") == [tmp_path / "test.txt"]


ROWS = [{"text": f"row {i} {LONG}"} for i in range(30)]


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.json.gz", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "saved"])
def test_rows_of_every_kind_of_file_are_the_same(kind: str, tmp_path: Path, token_cache: str, words: Any) -> None:
    packed = "\n".join(json.dumps(row) for row in ROWS).encode()
    file = tmp_path / kind
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(file)
    elif kind.endswith("parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(file)
    elif kind.endswith("gz"):
        file.write_bytes(gzip.compress(packed))
    elif kind.endswith("zst"):
        with pyarrow.output_stream(str(file), compression="zstd") as stream:
            stream.write(packed)
    else:
        file.write_bytes(packed)
    for name in (file, tmp_path):
        data = opened(name=str(name), eval_name="pydocs", eval_segments=2, cache_dir=token_cache)
        assert texts(data, words)["train"] == "".join(f"{row['text']}|" for row in ROWS)


def test_a_saved_dictionary_has_its_splits_and_markdown_is_text(tmp_path: Path, token_cache: str, words: Any) -> None:
    parts = {split: datasets.Dataset.from_list([{"text": f"{split} {LONG}"}]) for split in ("train", "validation")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text("About it.")
    found = texts(opened(name=str(tmp_path / "saved"), cache_dir=token_cache), words)
    assert found == {"train": f"train {LONG}|"} | dict.fromkeys(("validation", "test"), f"validation {LONG}|")
    (tmp_path / "notes.md").write_text(LONG * 20)
    assert "alpha" in texts(opened(name=str(tmp_path / "notes.md"), cache_dir=token_cache), words)["train"]


def test_packed_lines_that_are_no_json_are_named(tmp_path: Path, token_cache: str) -> None:
    with pyarrow.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
        stream.write(b'{"text": "one"}\nnothing\n')
    data = CalibrationData(str(tmp_path / "a.jsonl.zst"), cache_dir=token_cache)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst': line 2 is no JSON"):
        data.prepare_data()


def test_the_column_of_the_text_can_be_named(tmp_path: Path, token_cache: str, words: Any) -> None:
    name = write(tmp_path / "a.jsonl", [{"body": f"{i} {LONG}", "text": "no"} for i in range(30)])
    data = opened(name=name, text_column="body", cache_dir=token_cache)
    assert texts(data, words)["train"].startswith(f"0 {LONG}|1 ")
    with pytest.raises(UserError, match=r"has the columns \['body', 'text'\], and needs 'bodi': set data\.text_column"):
        CalibrationData(name, text_column="bodi", cache_dir=token_cache).prepare_data()


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, token_cache: str, words: Any) -> None:
    rows = [{"text": None if i % 3 == 0 else LONG} for i in range(30)]
    data = CalibrationData(write(tmp_path / "a.jsonl", rows), seq_len=8, batch_size=1, cache_dir=token_cache)
    with pytest.warns(UserWarning, match=r"10 of the 30 rows of .*a\.jsonl' have no 'text' \(null\)"):
        data.prepare_data()
    numbers = write(tmp_path / "b.jsonl", [{"text": 3}])
    with pytest.raises(UserError, match=r"b\.jsonl': row 1 holds '3' as 'text', which is no text"):
        CalibrationData(numbers, cache_dir=token_cache).prepare_data()


def scored(stream: np.ndarray, words: Any) -> list[str]:
    """Return the runs of tokens that are scored, as text."""
    runs = np.split(stream, np.flatnonzero(np.diff(stream < 0)) + 1)
    return [words.decode(run) for run in runs if run[0] >= 0]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_of_conversations_the_assistant_alone_is_scored(
    template: str, tmp_path: Path, token_cache: str, chat: str, words: Any
) -> None:
    words.chat_template = template
    words.save_pretrained(chat)
    name = write(tmp_path / "a.jsonl", [{"messages": TALK}] * 20)
    data = opened(name=name, tokenizer=chat, seq_len=16, eval_name="pydocs", eval_segments=2, cache_dir=token_cache)
    stream = data._tokens("train")
    whole = words.apply_chat_template(TALK, tokenize=False)
    assert words.decode(np.where(stream < 0, ~stream, stream)) == whole * 20
    assert scored(stream, words) == [f"{m['content']}</assistant>" for m in TALK if m["role"] == "assistant"] * 20
    data._sets["train"] = PackedTokens(stream, 16)
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"input_ids", "labels"} and batch["input_ids"].shape == (1, 16)
    labels = batch["labels"]
    assert torch.equal(labels[labels >= 0], batch["input_ids"][labels >= 0]) and (labels[:, 1:] >= 0).any()


@pytest.mark.parametrize("as_messages", [False, True])
def test_of_a_prompt_with_a_completion_the_completion_alone_is_scored(
    as_messages: bool, tmp_path: Path, token_cache: str, chat: str, words: Any
) -> None:
    row: dict[str, Any] = {"prompt": "Two and two?", "completion": " Four."}
    if as_messages:
        row = {"prompt": TALK[:3], "completion": TALK[3:]}  # the assistant's first answer is part of the prompt
    name = write(tmp_path / "a.jsonl", [row] * 30)
    data = opened(name=name, tokenizer=chat, cache_dir=token_cache, eval_name="pydocs", eval_segments=2)
    expected = f"{TALK[3]['content']}</assistant>" if as_messages else f" Four.{words.eos_token}"
    assert scored(data._tokens("train"), words) == [expected] * 30


@pytest.mark.parametrize("start", ["", "<system>Be brief.</system>"])
def test_a_conversation_may_begin_with_the_assistant(start: str, chat: str) -> None:
    words = AutoTokenizer.from_pretrained(chat)
    words.chat_template = start + TEMPLATE
    (tokens,) = next(encode([{"messages": TALK[1:]}], "messages", words, "rows", 10))
    assert scored(tokens, words) == [f"{m['content']}</assistant>" for m in TALK if m["role"] == "assistant"]


@pytest.mark.parametrize("as_json", [False, True])
def test_nulls_that_arrow_puts_into_messages_are_not_rendered_and_tools_are(
    as_json: bool, tmp_path: Path, chat: str
) -> None:
    """Arrow gives each call the arguments of all others, each message ``tool_calls``, and each tool all properties."""
    words = AutoTokenizer.from_pretrained(chat)
    words.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}<{{ m.role }}>{% if 'tool_calls' in m %}"
        "{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.content }}{% endif %}"
        "</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows, expected = [], []
    for key in ("city", "expr"):
        call = {"function": {"name": "f", "arguments": {key: "x"}}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": {key: {"type": "string"}}}}]
        talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
        rows.append({"messages": talk, "tools": json.dumps(tools) if as_json else tools})
        expected.append(words.apply_chat_template(talk, tools=tools, tokenize=False))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = next(encode(read([tmp_path / "a.parquet"]), "messages", words, "rows", 10))
    assert [words.decode(np.where(tokens < 0, ~tokens, tokens)) for tokens in found] == expected
    assert [scored(tokens, words) for tokens in found] == [['{"city": "x"}</assistant>'], ['{"expr": "x"}</assistant>']]
    with pytest.raises(UserError, match="row 1 holds 'search' as 'tools'"):
        next(encode([{"messages": TALK, "tools": "search"}], "messages", words, "rows", 10))


def test_a_token_that_begins_in_the_prompt_and_ends_in_the_completion_is_scored(words: Any) -> None:
    """The blank at the end of the prompt and the completion are one token, which is all of the answer."""
    rows = [{"prompt": "Name the word: ", "completion": "the"}, {"prompt": "Name the word:", "completion": " the"}]
    first, second = next(encode(rows, "completion", words, "rows", 10))
    assert first.tolist() == second.tolist()
    assert scored(first, words) == [f" the{words.eos_token}"]


def test_sequences_in_which_nothing_is_scored_are_left_out() -> None:
    """Their loss would be 0 / 0."""
    stream = np.asarray([~1, ~2, ~3, ~4, 5, ~6, ~7, ~8, ~9, 10, ~11, ~12], dtype=np.int64)
    packed = PackedTokens(stream, 4)  # of the second, only the first token is scored, which nothing predicts
    assert len(packed) == 1
    assert packed[0]["input_ids"].tolist() == [9, 10, 11, 12] and packed[0]["labels"].tolist() == [-100, 10, -100, -100]
    with_bos = PackedTokens(stream, 5, bos=0)
    assert [item["input_ids"].tolist() for item in (with_bos[0], with_bos[1])] == [[0, 5, 6, 7, 8], [0, 9, 10, 11, 12]]
    assert len(PackedTokens(stream, 5, bos=0, most=1)) == 1
    shares = [EvaluationShare(with_bos, 3, rank) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1] and (shares[2][0]["labels"] == -100).all()


def test_a_model_is_trained_and_measured_on_conversations(
    tiny_llama: str, tmp_path: Path, token_cache: str, chat: str
) -> None:
    name = write(tmp_path / "a.jsonl", [{"messages": TALK}] * 40)
    data = CalibrationData(name, tokenizer=chat, seq_len=32, batch_size=2, cache_dir=token_cache)
    module = CausalLM(tiny_llama, distillation=0.5, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
    trainer = Trainer(
        accelerator="cpu", max_steps=15, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data)
    assert module.dense_perplexity and module.final_perplexity and module.final_perplexity < module.dense_perplexity
    assert "what is answered alone" in data.protocol()
    model = module.model
    assert model is not None
    batches = [batch for batch in data.val_dataloader() if isinstance(batch, dict)]
    losses: list[Tensor] = []
    for batch in batches:
        with torch.no_grad():
            logits = model.eval()(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        picked = batch["labels"][:, 1:].flatten() >= 0
        losses.append(torch.nn.functional.cross_entropy(
            logits[picked], batch["labels"][:, 1:].flatten()[picked], reduction="none"
        ))  # fmt: skip
    assert float(torch.cat(losses).mean().exp()) == pytest.approx(module.final_perplexity, rel=1e-4)


def refused(name: str, tokenizer: str, cache: str) -> str:
    with pytest.raises(UserError) as error:
        CalibrationData(name, tokenizer=tokenizer, seq_len=8, cache_dir=cache).prepare_data()
    return str(error.value)


def test_what_conversations_need_is_said(tmp_path: Path, token_cache: str, chat: str, words: Any) -> None:
    talk = write(tmp_path / "a.jsonl", [{"messages": TALK}])
    assert "has no chat template" in refused(talk, EMBEDDED_MODEL, token_cache)
    bad = write(tmp_path / "b.jsonl", [{"messages": [{"from": "human", "value": "hi"}]}])
    assert "row 1 holds" in refused(bad, chat, token_cache)
    words.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{% endfor %}"
    words.save_pretrained(tmp_path / "forgets")
    assert "renders a message differently when others follow" in refused(talk, str(tmp_path / "forgets"), token_cache)
    words.chat_template = "{{ raise_exception('no system message') }}"
    words.save_pretrained(tmp_path / "raises")
    assert "cannot render" in refused(talk, str(tmp_path / "raises"), token_cache)
