"""The files that a run leaves for its report, with any logger; and that TensorBoard can compare runs."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from elsa_lightning import NM, ElsaCallback, KeepMask
from elsa_lightning.callbacks.journal import JOURNAL
from elsa_lightning.watch import BINS, DECADES

from .tiny import At, Crash, Net, crash, every_step, fit, interrupt, loader, make_trainer, stop

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WEIGHTS = 2 * 64 * 64


def journal(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob(JOURNAL)
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def test_a_run_without_a_logger_notes_ten_times_where_it_was(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path))
    found = journal(tmp_path)
    assert found["status"] == "finished" and found["step"] == 20 and found["seconds"] > 0
    assert [note["step"] for note in found["notes"]] == list(range(2, 21, 2))
    assert all(note["metrics"]["loss"] > 0 and note["peak_memory"] > 2**20 for note in found["notes"])
    assert found["record"]["method"][0]["prox"] == "linearized" and "command" in found["record"]
    tensors = found["tensors"]
    assert tensors == {f"layers.{i}.weight": [tensors[f"layers.{i}.weight"][0], 4096, ANY, 64] for i in (0, 3)}
    assert sum(tensor[0] for tensor in tensors.values()) == 8192 - 7373


@pytest.mark.parametrize("constraint", [None, NM(2, 4)])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_scores_lie_about_their_threshold(constraint: Any, optimizer: str, tmp_path: Path) -> None:
    """A set that keeps the largest scores separates kept from cut ones, up to the width of a bin; 2:4 does not."""
    of = {"constraint": constraint, "sparsity": None} if constraint else {}
    fit(tmp_path, every_step(tmp_path), elsa={"interval": 2, **of}, net={"optimizer": optimizer})
    moving = [note["scores"] for note in journal(tmp_path)["notes"] if note["scores"]]
    assert len(moving) >= 5
    for scores in moving:
        kept, cut = torch.tensor(scores["kept"]), torch.tensor(scores["cut"])
        assert len(kept) == len(cut) == 2 * DECADES * BINS and int(kept.sum() + cut.sum()) == WEIGHTS
        middle = DECADES * BINS
        wrong = int(kept[:middle].sum() + cut[middle + 1 :].sum())
        assert wrong > 0.02 * WEIGHTS if constraint else wrong == 0


def test_how_a_run_ends_is_written(tmp_path: Path) -> None:
    for name, action, status in (("a", stop, "unfinished"), ("b", crash, "failed"), ("c", interrupt, "interrupted")):
        try:
            fit(tmp_path / name, every_step(tmp_path / name), At(7, action))
        except (Crash, SystemExit):
            assert action is not stop
        found = journal(tmp_path / name)
        assert (found["status"], found["step"]) == (status, 7)
    assert journal(tmp_path / "b")["error"].startswith("Crash")


class FailsAtTheEnd(Callback):
    """Does what an export does that fails when training is over."""

    def on_fit_end(self, *_: Any) -> None:
        raise Crash("disk is full")


@pytest.mark.parametrize("steps", [4, 0])
def test_a_run_whose_export_fails_has_not_finished(steps: int, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        fit(tmp_path, every_step(tmp_path), FailsAtTheEnd(), max_steps=steps)
    found = journal(tmp_path)
    assert (found["status"], found["error"], found["step"]) == ("failed", "Crash: disk is full", steps)
    assert not (tmp_path / "elsa_run_1.json").exists()


class FailsInValidation(Net):
    """Trains, and cannot be validated."""

    def validation_step(self, *_: Any) -> None:
        raise Crash


def test_an_error_of_what_is_done_after_a_run_is_not_the_runs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ElsaCallback(sparsity=0.9, interval=2), every_step(tmp_path), max_steps=4)
    trainer.fit(model := FailsInValidation(), loader())
    with pytest.raises(Crash):
        trainer.validate(model, loader())
    assert journal(tmp_path)["status"] == "finished"


def test_a_resumed_run_names_the_checkpoint_and_leaves_the_first_journal_alone(tmp_path: Path) -> None:
    fit(tmp_path, every_step(tmp_path), At(7, stop))
    first = journal(tmp_path)
    fit(tmp_path, every_step(tmp_path), resume=tmp_path / "7.ckpt")
    assert json.loads((tmp_path / JOURNAL).read_text()) == first
    second = json.loads((tmp_path / "elsa_run_1.json").read_text())
    assert second["resumed_from"] == str(tmp_path / "7.ckpt") and second["first_step"] == 7
    assert second["status"] == "finished" and second["notes"][0]["step"] > 7


def test_a_run_that_writes_nothing_leaves_no_journal(tmp_path: Path) -> None:
    fit(tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_one_shot_and_fine_tuning_have_one_too(tmp_path: Path) -> None:
    model, _ = fit(tmp_path / "once", every_step(tmp_path / "once"), max_steps=0)
    assert journal(tmp_path / "once")["status"] == "finished"
    trainer = make_trainer(tmp_path / "keep", KeepMask(), every_step(tmp_path / "keep"), max_steps=4)
    trainer.fit(model, loader())
    found = journal(tmp_path / "keep")
    assert found["status"] == "finished" and found["notes"][-1]["step"] == 4
    assert found["notes"][-1]["scores"] is None and sum(t[0] for t in found["tensors"].values()) == 8192 - 7373


class Theirs(Net):
    """Has hyperparameters of its own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("module", [Net, Theirs])
def test_the_hparams_tab_has_the_method_and_the_module(module: type[Net], tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version="run")
    make_trainer(tmp_path, ElsaCallback(sparsity=0.9, interval=3), logger=logger, max_steps=6).fit(module(), loader())
    events = EventAccumulator(str(logger.log_dir)).Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["elsa/sparsity"].number_value == 0.9
    assert found["elsa/form"].string_value == "linearized" and "0.9" in found["elsa/constraint"].string_value
    assert found["optimizer/lr"].number_value == pytest.approx(3e-3) and found["trainer/steps"].number_value == 6
    assert ("width" in found) == (module is Theirs)
    assert "hp_metric" in events.Tags()["scalars"]


def test_every_logger_is_told_the_settings(tmp_path: Path) -> None:
    from elsa_lightning import ElsaCallback

    csv = CSVLogger(tmp_path, name="csv")
    make_trainer(tmp_path, ElsaCallback(sparsity=0.9, interval=3), logger=csv, max_steps=6).fit(Theirs(), loader())
    told = (Path(csv.log_dir) / "hparams.yaml").read_text()
    assert "elsa/sparsity: 0.9" in told and "width: 3" in told


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    from elsa_lightning import ElsaCallback

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer: Trainer = make_trainer(tmp_path, ElsaCallback(sparsity=0.9, interval=3), logger=logger, max_steps=6)
    trainer.fit(Theirs(), loader())
    assert logger.experiment.config["elsa/sparsity"] == 0.9
    assert journal(tmp_path)["status"] == "finished"
