"""Text to batches: packing, order, caches, places to resume at, and clear errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoTokenizer

from elsa_lightning import CalibrationData
from elsa_lightning.lm import EMBEDDED_MODEL, model_path, pydocs
from elsa_lightning.lm.data import PackedTokens


def prepared(cache: str, stage: str = "fit", **options: Any) -> CalibrationData:
    data = CalibrationData(**{"seq_len": 32, "cache_dir": cache, **options})
    data.prepare_data()
    data.setup(stage)
    return data


def test_packing_cuts_the_stream_and_drops_the_tail() -> None:
    packed = PackedTokens(np.arange(23, dtype=np.int32), 5)
    assert len(packed) == 4
    assert torch.equal(torch.cat([packed[i] for i in range(4)]), torch.arange(20))
    with_bos = PackedTokens(np.arange(23, dtype=np.int32), 5, bos=99)
    assert len(with_bos) == 5 and with_bos[1].tolist() == [99, 4, 5, 6, 7]


def test_batches_are_seeded_and_hold_every_sequence_once(text_file: Path, token_cache: str) -> None:
    def epoch(seed: int) -> Tensor:
        return torch.cat(list(prepared(token_cache, name=str(text_file), seed=seed, batch_size=2).train_dataloader()))

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.int64 and first.shape[1] == 32
    stream = prepared(token_cache, name=str(text_file))._sets["train"]
    expected = {tuple(stream[i].tolist()) for i in range(len(stream))}
    assert {tuple(row.tolist()) for row in first} <= expected and len(first) >= len(stream) - 1


class Recorder(LightningModule):
    """Remembers the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.clone())
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        _ = self.trainer.estimated_stepping_batches  # as schedules do; it sets the data up before it is restored
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Crash(Callback):
    """Fails after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("end", [{"max_steps": 40}, {"max_epochs": 2}])
@pytest.mark.parametrize("save_at", [3, "epoch's end", 25])
def test_a_resumed_run_goes_on_at_the_very_next_sample(
    save_at: int | str, end: dict[str, int], workers: int, text_file: Path, token_cache: str, tmp_path: Path
) -> None:
    def data() -> CalibrationData:
        return CalibrationData(
            str(text_file), seq_len=32, batch_size=8, train_sequences=160, num_workers=workers, cache_dir=token_cache
        )

    def fit(*callbacks: Callback, ckpt: Path | None = None) -> Recorder:
        module = Recorder()
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **end,
        )  # fmt: skip
        trainer.fit(module, data(), ckpt_path=ckpt)
        return module

    at = 20 if save_at == "epoch's end" else int(save_at)
    whole = fit().seen
    assert len(whole) == 40
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=at, save_top_k=-1, filename="{step}")
    with pytest.raises(RuntimeError, match="crash"):
        fit(saver, Crash(at + 2))
    resumed = fit(ckpt=tmp_path / f"step={at}.ckpt").seen
    assert len(resumed) == 40 - at
    assert all(torch.equal(a, b) for a, b in zip(whole[at:], resumed, strict=True))


@pytest.mark.parametrize("by", ["limit_train_batches", "overfit_batches"])
@pytest.mark.parametrize(("limit", "at"), [(4, 8), (4, 6), (7, 14), (7, 9), (0.5, 10), (0.5, 13)])
def test_epochs_that_are_limited_resume_at_the_very_next_sample(
    limit: float, at: int, by: str, text_file: Path, token_cache: str, tmp_path: Path
) -> None:
    """Of 10 batches an epoch takes fewer, and the next begins at the first of its own order, or of the data's."""

    def fit(*callbacks: Callback, ckpt: Path | None = None) -> list[Tensor]:
        module = Recorder()
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
            callbacks=list(callbacks), enable_checkpointing=bool(callbacks), max_epochs=3, **{by: limit},
        )  # fmt: skip
        data = CalibrationData(str(text_file), seq_len=32, batch_size=4, train_sequences=40, cache_dir=token_cache)
        trainer.fit(module, data, ckpt_path=ckpt)
        return module.seen

    whole = fit(ModelCheckpoint(tmp_path, every_n_train_steps=at, save_top_k=-1, filename="{step}"))
    assert len(whole) == 3 * (limit if limit > 1 else 5)
    resumed = fit(ckpt=tmp_path / f"step={at}.ckpt")
    assert len(resumed) == len(whole) - at
    assert all(torch.equal(a, b) for a, b in zip(whole[at:], resumed, strict=True))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_local_files_of_every_kind(kind: str, text_file: Path, token_cache: str, tmp_path: Path) -> None:
    documents = text_file.read_text(encoding="utf-8").split("\n\n")[:200]
    if kind in ("txt", "folder"):
        for i, part in enumerate((documents[:100], documents[100:])):
            (tmp_path / f"{i}.txt").write_text("\n\n".join(part), encoding="utf-8")
    elif kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents), encoding="utf-8")
    else:
        import datasets

        datasets.Dataset.from_dict({"text": documents}).to_parquet(str(tmp_path / "a.parquet"))
    name = tmp_path if kind == "folder" else next(iter(sorted(tmp_path.iterdir())))
    data = prepared(token_cache, name=str(name), batch_size=2)
    tokenizer = AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))
    start = tokenizer.decode(data._sets["train"][0])
    assert documents[0].strip()[:20] in start
    parts = {split: data._sets[split].tokens for split in ("train", "validation")}
    data.setup("test")
    parts["test"] = data._sets["test"].tokens
    sizes = {split: len(tokens) for split, tokens in parts.items()}
    assert sizes["train"] == pytest.approx(18 * sizes["validation"], rel=0.1)
    assert sizes["validation"] == sizes["test"]


def test_tokens_are_made_once_and_again_when_the_text_changes(tmp_path: Path, text_file: Path) -> None:
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    prepared(str(cache), name=str(text))
    (made,) = cache.iterdir()
    stamp = made.stat().st_mtime_ns
    prepared(str(cache), name=str(text), seed=5, batch_size=2, seq_len=16)
    assert [file.stat().st_mtime_ns for file in cache.iterdir()] == [stamp]
    text.write_text(text_file.read_text(encoding="utf-8") * 2, encoding="utf-8")
    prepared(str(cache), name=str(text))
    assert len(list(cache.iterdir())) == 2


def test_evaluation_is_the_joined_text_cut_into_segments(token_cache: str) -> None:
    data = prepared(token_cache, "validate", eval_segments=50, eval_batch_size=7)
    tokenizer = AutoTokenizer.from_pretrained(model_path(EMBEDDED_MODEL))
    joined = tokenizer("\n\n".join(pydocs.documents("validation")), verbose=False)["input_ids"]
    assert torch.cat(list(data.val_dataloader())).flatten().tolist() == joined[: 50 * 32]
    assert data.protocol() == "pydocs validation, 50 segments of 32 tokens"


def test_every_segment_starts_with_bos_where_it_is_asked_for(token_cache: str) -> None:
    data = prepared(token_cache, "validate", eval_segments=5, bos_per_segment=True)
    segments = torch.cat(list(data.val_dataloader()))
    assert (segments[:, 0] == 0).all() and (segments[:, 1:] != 0).any()
    assert "BOS at each segment" in data.protocol()


def test_pydocs_splits_are_disjoint_and_fixed() -> None:
    splits = {split: list(pydocs.documents(split)) for split in ("train", "validation", "test")}  # type: ignore[arg-type]
    assert all(len(documents) > 10 for documents in splits.values())
    assert splits["validation"] == list(pydocs.documents("validation"))
    assert not set(splits["train"]) & (set(splits["validation"]) | set(splits["test"]))
    assert sum(map(len, splits["train"])) > 5e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "no/such/file"}, "'no/such/file' is not 'pydocs', 'c4' or 'wikitext2', and no file"),
        ({"eval_name": "wikitxt"}, "'wikitxt' is not"),
        ({"seq_len": 1}, "seq_len must be 2 or more, got 1"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"train_sequences": 0}, "train_sequences must be 1 or more, got 0"),
        ({"name": "c4", "streaming": True}, "streaming needs train_sequences"),
        ({"tokenizer": "./nowhere"}, "'./nowhere' is a path that does not exist"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CalibrationData(**options)


def test_bad_files_are_named(tmp_path: Path, token_cache: str) -> None:
    with pytest.raises(ValueError, match=r"holds no file that ends in \.txt"):
        CalibrationData(str(tmp_path))
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(ValueError, match=r"the train text of .*short.txt' has \d+ tokens, 0 sequences of 32"):
        prepared(token_cache, name=str(tmp_path / "short.txt"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"has \d tokens, 0 sequences"):
        prepared(token_cache, name=str(tmp_path / "empty.txt"))
    columns = tmp_path / "columns"
    columns.mkdir()
    (columns / "a.jsonl").write_text('{"body": "words"}\n')
    with pytest.raises(ValueError, match=r"has the columns \['body'\], and needs 'text', 'messages', or 'prompt'"):
        prepared(token_cache, name=str(columns))


def test_without_a_network_the_error_names_the_offline_choices(token_cache: str) -> None:
    for name, repository in (("c4", "allenai/c4"), ("wikitext2", "Salesforce/wikitext")):
        with pytest.raises(OSError, match=rf"downloading {repository} .*failed(?s:.)*--data.name pydocs"):
            prepared(token_cache, name=name, train_sequences=4)


def test_a_checkpoint_of_other_data_is_refused(text_file: Path, token_cache: str) -> None:
    state = prepared(token_cache, name=str(text_file)).state_dict()
    other = CalibrationData(str(text_file), seq_len=16, cache_dir=token_cache)
    with pytest.raises(ValueError, match=r"was made with data\.seq_len=32, this run has 16"):
        other.load_state_dict(state)


def test_a_run_of_two_processes_goes_on_in_one_with_batches_of_both(text_file: Path, token_cache: str) -> None:
    def data(batch_size: int, processes: int) -> CalibrationData:
        made = CalibrationData(str(text_file), seq_len=32, batch_size=batch_size, cache_dir=token_cache)
        if processes > 1:  # this is the first of them
            made.trainer = Trainer(accelerator="cpu", devices=processes, strategy="ddp", logger=False)
        made.setup("fit")
        return made

    two = data(2, processes=2)
    batches = iter(two.train_dataloader())
    for _ in range(3):
        next(batches)
    state = two.state_dict()
    one = data(4, processes=1)
    one.load_state_dict(state)
    assert torch.equal(next(iter(one.train_dataloader()))[::2], next(batches))
    with pytest.raises(ValueError, match=r"was made with data\.batch_size × processes=4, this run has 2"):
        data(2, processes=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b""), ("a.jsonl", b"not json"), ("a.parquet", b"no table"), ("a.txt", b"\xff\xfe\xfd" * 50)],
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, tiny_llama: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    data = CalibrationData(str(file), tokenizer=tiny_llama, seq_len=8, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=rf"a{file.suffix}' is no readable {file.suffix}: \S"):
        data.prepare_data()
        data.setup("fit")


def test_the_place_in_the_data_matters_to_training_alone(text_file: Path, token_cache: str, tmp_path: Path) -> None:
    """A checkpoint can be tested with other batches, lengths and text."""

    class Scored(Recorder):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.seen.append(batch)

        validation_step = predict_step = test_step

    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, limit_val_batches=1,
            default_root_dir=tmp_path,
        )  # fmt: skip

    def data(**options: Any) -> CalibrationData:
        return CalibrationData(**{"name": str(text_file), "seq_len": 32, "cache_dir": token_cache, **options})

    first = trainer()
    first.fit(Scored(), data())
    first.save_checkpoint(tmp_path / "a.ckpt")
    others = {"seq_len": 16, "batch_size": 2, "seed": 3, "train_sequences": 40, "eval_name": "pydocs"}
    for method in ("validate", "test", "predict"):
        module = Scored()
        getattr(trainer(), method)(module, data(**others), ckpt_path=tmp_path / "a.ckpt")
        assert module.seen[0].shape == (2, 16)
    with pytest.raises(ValueError, match=r"the last tenth held out=True, this run has False"):
        trainer().fit(Scored(), data(eval_name="pydocs"), ckpt_path=tmp_path / "a.ckpt")


def test_only_what_a_command_needs_is_read(token_cache: str) -> None:
    """Here the training text would have to be downloaded."""

    class Scored(Recorder):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.seen.append(batch)

    data = CalibrationData("c4", eval_name="pydocs", seq_len=32, eval_segments=4, cache_dir=token_cache)
    module = Scored()
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(module, data)
    assert len(torch.cat(module.seen)) == 4


def test_of_several_files_the_broken_one_is_named(tmp_path: Path, token_cache: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a text " * 200)
    (folder / "b.txt").write_bytes("Ünlesbär ".encode("latin-1") * 200)
    with pytest.raises(ValueError, match=r"b\.txt' is no readable \.txt"):
        prepared(token_cache, name=str(folder))


def test_without_validation_no_validation_text_is_needed(tmp_path: Path, token_cache: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.txt").write_text("a text to train on, and more of it " * 200)
    (folder / "test.txt").write_text("short")
    data = CalibrationData(str(folder), seq_len=32, batch_size=2, cache_dir=token_cache)
    options = {"max_steps": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    with pytest.raises(ValueError, match="the validation text of"):
        Trainer(**options).fit(Recorder(), data)
    recorder = Recorder()
    Trainer(**options, limit_val_batches=0).fit(recorder, data)
    assert len(recorder.seen) == 1
