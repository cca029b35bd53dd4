"""However a run ends, saved models have exact zeros, and resumed runs are those that were not interrupted."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from elsa_lightning import ElsaCallback
from elsa_lightning.callbacks import SaveOnTerminate
from elsa_lightning.tensors import REMOVED, SPLIT
from tests.callbacks.tiny import (
    BATCHES,
    At,
    Net,
    Points,
    assert_same,
    assert_same_run,
    every_step,
    fit,
    load,
    loader,
    make_trainer,
    stop,
    zeros,
)

EXACT = 7373  # 90 % of both, 8192
UNFINISHED = "ignore:Elsa is unfinished:UserWarning"


class StopInModule(Net):
    """Asks for the stop in one of its own hooks, which run after those of every callback."""

    hook = ""

    def on_train_epoch_end(self) -> None:
        if self.hook == "epoch" and self.trainer.current_epoch == 1:
            self.trainer.should_stop = True

    def on_validation_epoch_end(self) -> None:
        if self.hook == "validation" and self.trainer.current_epoch == 1:
            self.trainer.should_stop = True

    def on_train_batch_end(self, *args: Any) -> None:
        if self.hook == "batch" and self.trainer.global_step == 2 * BATCHES:
            self.trainer.should_stop = True


STOPPERS: dict[str, tuple[str, list[Callback]]] = {
    "early stopping at an epoch's end": ("", [EarlyStopping("loss", stopping_threshold=1e9, check_finite=False)]),
    "early stopping at validation": (
        "", [EarlyStopping("val_loss", stopping_threshold=1e9, check_on_train_epoch_end=False)],
    ),
    "a request in the middle of an epoch": ("", [At(9, stop)]),
    "the module at an epoch's end": ("epoch", []),
    "the module at validation": ("validation", []),
    "the module after a batch": ("batch", []),
}  # fmt: skip
SAVERS: dict[str, dict[str, Any]] = {
    "every step": {"every_n_train_steps": 1, "save_top_k": -1},
    "every step, the last": {"every_n_train_steps": 1, "save_top_k": 1, "save_last": True},
    "every epoch": {"every_n_epochs": 1, "save_top_k": -1},
    "at validation": {"monitor": "val_loss", "save_top_k": -1, "save_on_train_epoch_end": False},
    "weights of every epoch": {"every_n_epochs": 1, "save_top_k": -1, "save_weights_only": True},
}


@pytest.mark.filterwarnings(UNFINISHED)
@pytest.mark.parametrize("before", [True, False], ids=["listed before", "listed after"])
@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("stopper", STOPPERS)
def test_checkpoints_of_the_step_that_turned_out_the_last_have_the_zeros(
    stopper: str, saver: str, before: bool, tmp_path: Path
) -> None:
    import copy

    hook, stoppers = copy.deepcopy(STOPPERS[stopper])
    checkpoint = ModelCheckpoint(tmp_path, "{step}", auto_insert_metric_name=False, **SAVERS[saver])
    frozen = 0.5 if "early stopping" in stopper else 0.0  # it counts from when the mask is fixed
    full = round(0.4 * 10 * BATCHES)  # the end of the ramp, from where on the weights lie on the set
    elsa = ElsaCallback(sparsity=0.9, interval=3, frozen=frozen)
    callbacks = [*stoppers, elsa] if before else [elsa, *stoppers]
    model = StopInModule()
    model.hook = hook
    trainer = make_trainer(tmp_path, *callbacks, checkpoint, max_epochs=10)
    trainer.fit(model, loader(), loader(2))
    assert trainer.global_step < 10 * BATCHES
    assert sum(zeros(model.state_dict()).values()) == EXACT
    saved = {file: load(file) for file in tmp_path.glob("*.ckpt")}
    last = {file.name: s for file, s in saved.items() if s["global_step"] == trainer.global_step}
    for name, content in last.items():
        assert sum(zeros(content["state_dict"]).values()) == EXACT, name
    earlier = [s for s in saved.values() if s["global_step"] < min(trainer.global_step, full)]
    assert all(sum(zeros(s["state_dict"]).values()) != EXACT for s in earlier)  # the run itself is left alone
    if stopper != "a request in the middle of an epoch" or "step" in saver:
        assert last


@pytest.mark.parametrize("frozen", [0.0, 0.5])
@pytest.mark.parametrize("step", [6, 9, 12])
def test_an_early_stop_that_is_resumed_never_was(step: int, frozen: float, tmp_path: Path) -> None:
    settings = {"elsa": {"frozen": frozen}, "max_epochs": 3}
    fit(tmp_path / "whole", every_step(tmp_path / "whole"), **settings)
    with pytest.warns(UserWarning, match=f"unfinished: {step} of 18"):
        fit(tmp_path / "stopped", every_step(tmp_path / "stopped"), At(step, stop), **settings)
    saved = load(tmp_path / f"stopped/{step}.ckpt")
    assert sum(zeros(saved["state_dict"]).values()) == EXACT
    fit(tmp_path / "on", every_step(tmp_path / "on"), resume=tmp_path / f"stopped/{step}.ckpt", **settings)
    assert_same_run(tmp_path / "on/18.ckpt", tmp_path / "whole/18.ckpt")


class Losses(Callback):
    """Keeps what training and validation saw."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.seen.append(outputs["loss"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(trainer.callback_metrics["val_loss"])


@pytest.mark.parametrize("least", [{"min_steps": 20}, {"min_epochs": 4}])
def test_a_request_to_stop_that_is_not_heeded_changes_nothing(least: dict[str, int], tmp_path: Path) -> None:
    runs = []
    for name, stopper in (("quiet", []), ("asked", [At(4, stop)])):
        losses = Losses()
        options: dict[str, Any] = {"validation": loader(2), "val_check_interval": 2, "max_steps": 20} | least
        model, _ = fit(tmp_path / name, losses, every_step(tmp_path / name), *stopper, **options)
        runs.append((losses.seen, dict(model.state_dict())))
    assert_same(runs[0], runs[1])
    for step in (3, 4, 5, 11):
        assert_same_run(tmp_path / f"quiet/{step}.ckpt", tmp_path / f"asked/{step}.ckpt")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_schedule_knows_the_steps_of_a_run_of_epochs(accumulate: int, tmp_path: Path) -> None:
    _, elsa = fit(tmp_path, max_epochs=3, accumulate_grad_batches=accumulate)
    assert elsa.admm is not None
    assert elsa.admm.step == elsa.admm.total_steps == 3 * (6 if accumulate == 1 else 2)
    assert elsa.admm.finished


def test_the_last_validation_is_of_the_pruned_model(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, ElsaCallback(sparsity=0.9, frozen=0), max_epochs=2)
    trainer.fit(model, loader(), loader(2))
    during = float(trainer.callback_metrics["val_loss"])
    (after,) = trainer.validate(model, loader(2), verbose=False)
    assert after["val_loss"] == pytest.approx(during, rel=1e-6)  # memory that lies elsewhere sums in another order


def test_a_last_epoch_that_is_cut_short_is_an_end_too(tmp_path: Path) -> None:
    class Short(Net):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    model, elsa = Short(), ElsaCallback(sparsity=0.9)
    checkpoint = ModelCheckpoint(tmp_path, "end")
    with pytest.warns(UserWarning, match=r"Elsa is unfinished: 6 of 12 .* fewer than Lightning counts"):
        make_trainer(tmp_path, elsa, checkpoint, max_epochs=2).fit(model, loader())
    assert elsa.admm is not None
    assert elsa.admm.suspended
    assert sum(zeros(load(tmp_path / "end.ckpt")["state_dict"]).values()) == EXACT


def test_an_end_that_no_checkpoint_holds_is_told(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4)
    with pytest.warns(UserWarning, match="no checkpoint of this last step was saved"):
        fit(tmp_path, saver, At(6, stop))


def test_an_end_leaves_nothing_behind(tmp_path: Path) -> None:
    """After a finished run the optimizer keeps a mask only, and neither it nor the module any hook."""
    model, elsa = fit(tmp_path, every_step(tmp_path))
    state = load(tmp_path / "20.ckpt")["optimizer_states"][0]["state"]
    assert not any({SPLIT, REMOVED} & s.keys() for s in state.values())
    assert not model._state_dict_pre_hooks
    assert elsa.admm is not None
    assert not elsa.admm.optimizer._optimizer_step_post_hooks
    assert not elsa.admm.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_a_loss_that_diverges_ends_with_what_to_change(lr: float, tmp_path: Path) -> None:
    class Hot(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=lr)

    trainer = make_trainer(tmp_path, ElsaCallback(sparsity=0.9), max_steps=64)
    message = r"(no longer finite: the loss diverged|20 in a row).*[Ll]ower the learning rate.*gradient_clip_val"
    with pytest.raises(ValueError, match=message):
        trainer.fit(Hot(), loader())


def test_fast_dev_run_prunes_its_one_step(tmp_path: Path) -> None:
    model = Net()
    make_trainer(tmp_path, ElsaCallback(sparsity=0.9), fast_dev_run=True, max_epochs=5).fit(model, loader(), loader(1))
    assert sum(zeros(model.state_dict()).values()) == EXACT


def test_a_saver_can_watch_the_residual(tmp_path: Path) -> None:
    watcher = ModelCheckpoint(tmp_path, monitor="elsa/primal_residual", every_n_train_steps=3, save_top_k=1)
    fit(tmp_path, watcher)
    assert watcher.best_model_score is not None
    assert 0 <= float(watcher.best_model_score) < 1


def test_the_loaders_length_is_not_needed_with_max_steps(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            while True:
                yield from Points(8)

    model = Net()
    data = torch.utils.data.DataLoader(Endless(), batch_size=4)
    make_trainer(tmp_path, ElsaCallback(sparsity=0.9), max_steps=10, accumulate_grad_batches=2).fit(model, data)
    assert sum(zeros(model.state_dict()).values()) == EXACT


def test_a_step_without_finite_gradients_changes_nothing_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.global_step == 4 else loss

    def state(step: int) -> Any:
        checkpoint = load(tmp_path / f"{step}.ckpt")
        return checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"]

    trainer = make_trainer(tmp_path, ElsaCallback(sparsity=0.9, interval=3), every_step(tmp_path), max_steps=20)
    model = Broken()
    trainer.fit(model, loader())
    assert_same(state(4), state(5))
    assert sum("after optimizer step 4 the gradients are not finite" in r.message for r in caplog.records) == 1
    assert sum(zeros(model.state_dict()).values()) == EXACT


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_as_the_signal_does(signum: signal.Signals, tmp_path: Path) -> None:
    def ask(trainer: Trainer) -> None:
        os.kill(os.getpid(), signum)

    former = signal.getsignal(signum)
    fit(tmp_path / "whole", every_step(tmp_path / "whole"))
    with pytest.raises(SystemExit) as ended, pytest.warns(UserWarning, match="terminated after optimizer step 7"):
        fit(tmp_path, At(7, ask), SaveOnTerminate(str(tmp_path)))
    assert ended.value.code == 128 + signum
    assert signal.getsignal(signum) == former
    assert sum(zeros(load(tmp_path / "terminated-step=7.ckpt")["state_dict"]).values()) == EXACT
    fit(tmp_path, every_step(tmp_path), resume=tmp_path / "terminated-step=7.ckpt")
    assert_same_run(tmp_path / "20.ckpt", tmp_path / "whole/20.ckpt")


@pytest.mark.parametrize("least", [{"min_steps": 18}, {"min_epochs": 3}])
def test_a_signal_before_the_least_number_of_steps_leaves_exact_zeros_too(
    least: dict[str, int], tmp_path: Path
) -> None:
    """Lightning would not heed a request to stop there, but the process ends all the same."""

    def ask(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    fit(tmp_path / "whole", every_step(tmp_path / "whole"), **least)
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="terminated after optimizer step 7"):
        fit(tmp_path, At(7, ask), SaveOnTerminate(str(tmp_path)), **least)
    assert sum(zeros(load(tmp_path / "terminated-step=7.ckpt")["state_dict"]).values()) == EXACT
    fit(tmp_path, every_step(tmp_path), resume=tmp_path / "terminated-step=7.ckpt", **least)
    assert_same_run(tmp_path / "20.ckpt", tmp_path / "whole/20.ckpt")


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    class Slow(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(batch, batch_idx)

    former = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path, ElsaCallback(sparsity=0.9), SaveOnTerminate(str(tmp_path)), max_steps=20)
    with pytest.raises((KeyboardInterrupt, SystemExit)), pytest.warns(UserWarning, match="press Ctrl-C again"):
        trainer.fit(Slow(), loader())
    signal.signal(signal.SIGINT, former)
    assert not list(tmp_path.glob("*.ckpt"))
