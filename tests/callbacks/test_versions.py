"""Runs that are started together, or one after the other in one folder, leave each other's files alone."""

import threading
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from elsa_lightning.callbacks.versions import claim_versions, unused
from elsa_lightning.cli import main

RUNS = 8


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_runs_that_are_started_together_have_a_folder_each(kind: Any, tmp_path: Path) -> None:
    together, folders = threading.Barrier(RUNS), []
    trainers = [Trainer(accelerator="cpu", devices=1, logger=kind(tmp_path)) for _ in range(RUNS)]

    def start(trainer: Trainer) -> None:
        claim_versions(trainer)
        together.wait()
        folders.append(trainer.log_dir)

    threads = [threading.Thread(target=start, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {str(tmp_path / "lightning_logs" / f"version_{n}") for n in range(RUNS)}
    assert set(map(str, folders)) == expected
    for trainer, folder in zip(trainers, sorted(expected), strict=True):
        assert Path(folder).is_dir() and trainer.log_dir == trainer.loggers[0].log_dir


def test_a_version_that_was_asked_for_and_other_loggers_are_left_alone(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version="mine")
    trainer = Trainer(accelerator="cpu", devices=1, logger=logger)
    claim_versions(trainer)
    assert Path(trainer.log_dir or "").name == "mine"
    claim_versions(Trainer(accelerator="cpu", devices=1, logger=False))


def test_a_folder_is_made_when_it_is_needed_and_not_before(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, logger=TensorBoardLogger(tmp_path))
    claim_versions(trainer)
    assert not list(tmp_path.iterdir())


def test_a_name_is_given_once(tmp_path: Path) -> None:
    names = [unused(tmp_path / "a/config.yaml").name for _ in range(3)]
    assert names == ["config.yaml", "config_1.yaml", "config_2.yaml"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_runs_of_the_command_line_in_one_folder_keep_their_own_files(
    tiny_llama: str, token_cache: str, tmp_path: Path
) -> None:
    common = [
        f"--model.name={tiny_llama}", "--data.seq_len=32", "--data.eval_segments=4", f"--data.cache_dir={token_cache}",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
    ]  # fmt: skip
    for sparsity in (0.5, 0.75):
        main(["fit", "--config", "configs/elsa.yaml", "--trainer.max_steps=2", *common,
              f"--elsa.sparsity={sparsity}"])  # fmt: skip
    assert "sparsity: 0.5" in (tmp_path / "config.yaml").read_text()
    assert "sparsity: 0.75" in (tmp_path / "config_1.yaml").read_text()
    assert (tmp_path / "hf/model.safetensors").read_bytes() != (tmp_path / "hf_1/model.safetensors").read_bytes()
    for _ in range(2):
        main(["predict", *common])
    assert (tmp_path / "predictions.jsonl").read_text() == (tmp_path / "predictions_1.jsonl").read_text() != ""
