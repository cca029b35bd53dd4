"""Tasks of lm-eval on local data, without a network; left out where lm-eval is not installed."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from elsa_lightning import CalibrationData, CausalLM, ElsaCallback
from elsa_lightning.cli import main
from elsa_lightning.errors import UserError
from elsa_lightning.export.folders import RECORD
from elsa_lightning.export.record import Record

pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed", exc_type=ImportError)
from elsa_lightning.callbacks import ZeroShot
from elsa_lightning.evaluation import zero_shot

(TASK,) = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[2] / "docs/evaluation.md").read_text(), re.S)


def write_task(folder: Path, name: str, data: Path) -> None:
    text = TASK.replace("path/to/capitals.jsonl", str(data)).replace("task: capitals", f"task: {name}")
    (folder / f"{name}.yaml").write_text(text)


WORDS = ["def", "class", "import", "return", "module", "value", "list", "string", "number", "file", "object", "name"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks, as docs/evaluation.md describes them."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    for name, items in (("words", 30), ("few_words", 12)):
        rows = [
            {
                "question": " ".join(draw.choices(WORDS, k=4)),
                "choices": draw.sample(WORDS, 2),
                "right": draw.randrange(2),
            }
            for _ in range(items)
        ]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_task(folder, name, data)
    return folder


@pytest.fixture(scope="module")
def sparse(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run would leave of the tiny model: zeros, and a record that names its base."""
    folder = tmp_path_factory.mktemp("run") / "hf"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p[:, ::2] = 0
                p.mul_(8)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    (folder / RECORD).write_text(Record(base_model=tiny_llama).to_json())
    return folder


@pytest.fixture(autouse=True)
def _data_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    yield


@torch.no_grad()
def log_likelihood(model: Any, tokenizer: Any, context: str, choice: str) -> float:
    start, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, f"{context} {choice}"))
    ids = torch.tensor([whole])
    losses = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(losses[len(start) - 1 :].sum())


def test_accuracy_is_that_of_the_likelier_choice_and_nothing_else_changes(tiny_llama: str, tasks: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    model.train()
    states = torch.get_rng_state(), random.getstate()
    acc, acc_norm = zero_shot(model, tokenizer, ["words"], include_path=tasks)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1] and model.training
    model.eval()
    right, right_by_letter = [], []
    for row in map(json.loads, (tasks / "words.jsonl").read_text().splitlines()):
        context = f"Question: {row['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, choice) for choice in row["choices"]]
        by_letter = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append(scores.index(max(scores)) == row["right"])
        right_by_letter.append(by_letter.index(max(by_letter)) == row["right"])
    assert (acc.metric, acc.value) == ("acc", pytest.approx(sum(right) / 30))
    assert (acc_norm.metric, acc_norm.value) == ("acc_norm", pytest.approx(sum(right_by_letter) / 30))
    assert acc.error == pytest.approx((acc.value * (1 - acc.value) / 29) ** 0.5) and acc.count == 30
    assert "0 examples, float32, task version 1.0" in acc.protocol


def test_the_command_sets_a_run_beside_its_dense_model_without_a_network(
    sparse: Path, tiny_llama: str, tasks: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    main(["evaluate", str(sparse.parent), "--tasks", "words,few_words", "--include-path", str(tasks),
          "--perplexity", str(text_file), "--segments", "5", "--output", str(output), "--device", "cpu"])  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{sparse.parent} beside {tiny_llama}" in printed and "item by item (paired)" in printed
    report = json.loads(output.read_text())
    rows = {(row["name"], row["metric"]): row for row in report["figures"]}
    assert rows.keys() >= {("words", "acc"), ("words", "acc_norm"), ("few_words", "acc"), ("mean of 2", "acc")}
    assert all(row["difference"]["how"] == "paired" for row in rows.values())
    row = rows["words", "acc"]
    assert row["difference"]["value"] == pytest.approx(row["value"] - row["dense"]["value"])
    assert rows[str(text_file), "perplexity"]["protocol"].endswith("5 segments of 64 tokens, no BOS, float32")
    assert list(tmp_path.glob("*.tmp")) == [] and report["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "wrods"], "lm-eval knows no task 'wrods'; did you mean words?"),
        (["--tasks", "broken"], "the tasks broken could not be loaded"),
        (["--tasks", "words", "--limit", "0"], "limit must be 1 or more, got 0"),
        (["--tasks", "words", "--include-path", "/nowhere"], "include_path '/nowhere' is no folder"),
        (["--tasks", "words", "--device", "gpu"], "--device 'gpu' cannot be used"),
        (["--tasks", "words", "--output", "/no/where.json"], "--output '/no/where.json' must be a file in a folder"),
        (["--tasks", "none"], "nothing is to be measured"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], told: str, tiny_llama: str, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tasks, "broken", tasks / "gone.jsonl")
    with pytest.raises(SystemExit) as end:
        main(["evaluate", tiny_llama, "--include-path", str(tasks), *arguments])
    assert end.value.code == 1 and f"elsa: error: {told}" in capsys.readouterr().err


def test_questions_that_are_cut_are_counted(tiny_llama: str, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"question": "module " * 100, "choices": ["a", "b"], "right": 0}) + "\n"
    )
    write_task(tmp_path, "long", tmp_path / "long.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    found = zero_shot(model, tokenizer, ["long"], include_path=tmp_path)
    assert "inputs that were cut on the left to the model's 64 tokens: 1" in found[0].protocol
    assert found[0].error is None or found[0].error == 0


def test_a_run_evaluates_before_and_after_and_remembers_when_it_is_resumed(
    tiny_llama: str, token_cache: str, text_file: Path, tasks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(steps: int, resume: str | None = None) -> tuple[Trainer, ZeroShot]:
        callback = ZeroShot(["words"], include_path=str(tasks), limit=10)
        trainer = Trainer(
            max_steps=steps, accelerator="cpu", devices=1, callbacks=[callback, ElsaCallback(sparsity=0.75)],
            logger=CSVLogger(tmp_path), enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        data = CalibrationData(str(text_file), tokenizer=tiny_llama, seq_len=32, batch_size=2, cache_dir=token_cache)
        with caplog.at_level("INFO"):
            trainer.fit(CausalLM(tiny_llama), data, ckpt_path=resume)
        return trainer, callback

    trainer, first = fit(2)
    assert len(first.before) == len(first.after) == 2 and first.before[0].count == 10
    assert any("item by item (paired)" in message for message in caplog.messages)
    assert trainer.log_dir is not None
    (row, _) = json.loads(Path(trainer.log_dir, "evaluation.json").read_text())["figures"]
    assert row["value"] == first.after[0].value and row["dense"]["value"] == first.before[0].value
    assert "zero_shot/words_acc" in Path(trainer.log_dir, "metrics.csv").read_text()
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert torch.load(tmp_path / "two.ckpt", weights_only=True)["global_step"] == 2
    with pytest.warns(UserWarning):
        _, resumed = fit(3, resume=str(tmp_path / "two.ckpt"))
    assert resumed.before == first.before and resumed.before[0].parts


@pytest.mark.parametrize(
    ("tasks_", "module", "message"),
    [
        ("words", BoringModel, "ZeroShot needs a Hugging Face model in the module's attribute 'model'"),
        ("wrods", None, "knows no task 'wrods'"),
    ],
)
def test_what_could_not_be_evaluated_is_refused_before_training(
    tasks_: str, module: Any, message: str, tasks: Path, tmp_path: Path, tiny_llama: str
) -> None:
    trainer = Trainer(
        max_steps=1, accelerator="cpu", callbacks=[ZeroShot([tasks_], str(tasks), dense=False)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    made = module() if module else CausalLM(tiny_llama)
    with pytest.raises(UserError, match=message):
        trainer.fit(made, DataLoader(torch.zeros(4, 8, dtype=torch.long)))
    assert trainer.global_step == 0
