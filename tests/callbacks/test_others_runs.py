"""The callback in runs other than a plain fit: evaluation, later runs, tuners, and loops that step irregularly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from elsa_lightning import ElsaCallback, KeepMask
from elsa_lightning.errors import UserError
from tests.callbacks.tiny import At, Crash, Net, Points, crash, every_step, interrupt, loader, make_trainer, zeros

ENDS = "ignore:Elsa is unfinished:UserWarning"
STEPS = 30


def dense(net: Net) -> bool:
    """Whether hardly a weight is 0; some units get no gradient."""
    return all(count < 500 for count in zeros(net.state_dict()).values())


def test_evaluation_after_a_fit_takes_the_weights_as_they_are(tmp_path: Path) -> None:
    net = Net(dropout=0.0)
    start = copy.deepcopy(net.state_dict())
    trainer = make_trainer(tmp_path, ElsaCallback(0.9), every_step(tmp_path), max_steps=STEPS)
    trainer.fit(net, loader(), loader(shuffle=False))
    assert sum(zeros(net.state_dict()).values()) == 7373
    net.load_state_dict(start)
    found = trainer.validate(net, loader(shuffle=False), verbose=False)
    assert dense(net)
    assert found == make_trainer(tmp_path).validate(net, loader(shuffle=False), verbose=False)
    early = str(tmp_path / "5.ckpt")
    found = trainer.validate(net, loader(shuffle=False), ckpt_path=early, weights_only=True, verbose=False)
    assert 0 < sum(zeros(net.state_dict()).values()) < 7373
    assert found == make_trainer(tmp_path).validate(net, loader(shuffle=False), verbose=False)


class OneOptimizer(Net):
    """Gives every run the same optimizer."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.mine = torch.optim.Adam(self.parameters(), lr=3e-3)

    def configure_optimizers(self) -> Any:
        return self.mine


@pytest.mark.filterwarnings(ENDS)
@pytest.mark.parametrize("ends", [crash, interrupt])
def test_a_run_that_raised_leaves_the_next_ones_alone(tmp_path: Path, ends: Any) -> None:
    net = OneOptimizer()
    first = make_trainer(tmp_path, ElsaCallback(0.9), At(5, ends), max_steps=STEPS)
    with pytest.raises((Crash, SystemExit, KeyboardInterrupt)):
        first.fit(net, loader())
    make_trainer(tmp_path, max_steps=STEPS).fit(net, loader())
    assert dense(net)
    make_trainer(tmp_path, ElsaCallback(0.5), max_steps=STEPS).fit(net, loader())
    assert sum(zeros(net.state_dict()).values()) == 4096


def test_a_model_whose_zeros_were_kept_until_its_run_raised_trains_densely_afterwards(tmp_path: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.layers[3].weight[:32] = 0
    with pytest.raises(Crash):
        make_trainer(tmp_path, KeepMask(), At(5, crash), max_steps=STEPS).fit(net, loader())
    assert zeros(net.state_dict())["layers.3.weight"] == 2048
    make_trainer(tmp_path, max_steps=STEPS).fit(net, loader())
    assert zeros(net.state_dict())["layers.3.weight"] < 100


def warmed_up(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(optimizer, 20, 1e-4)]
    return lr_scheduler.SequentialLR(optimizer, parts, [5])


def chained(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(optimizer, 20)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


SCHEDULES = {
    "sequential": warmed_up,
    "chained": chained,
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 5e-3, step_size_up=4, cycle_momentum=False),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=40, cycle_momentum=False),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, eta_min=1e-4),
    "step": lambda o: lr_scheduler.StepLR(o, 5, 0.7),
}


class Scheduled(Net):
    """Has a schedule, and notes the rates."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make, self.rates = make, []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        return [optimizer], [{"scheduler": self.make(optimizer), "interval": "step"}]

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_chosen_rate_scales_the_whole_of_a_schedule(tmp_path: Path, name: str) -> None:
    rates = []
    for chosen in ({}, {"learning_rate": "auto"}):
        torch.manual_seed(0)
        net = Scheduled(SCHEDULES[name])
        make_trainer(tmp_path, ElsaCallback(0.5, **chosen), max_steps=20).fit(net, loader(batches=20))
        rates.append(torch.tensor(net.rates[1:]))
    ratios = rates[1] / rates[0]
    assert float(ratios[0]) != pytest.approx(1, abs=0.01)
    torch.testing.assert_close(ratios, torch.full_like(ratios, float(ratios[0])))


class Batches(LightningDataModule):
    """Has a batch size for a tuner to choose."""

    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(Points(48), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(Points(8), batch_size=self.batch_size)


def test_a_tuner_before_the_run_does_not_keep_the_rate_from_being_chosen(tmp_path: Path) -> None:
    rates = []
    for tuners in ([], [BatchSizeFinder(max_trials=2, steps_per_trial=2)]):
        torch.manual_seed(0)
        net = Scheduled(lambda o: lr_scheduler.ConstantLR(o, 1.0))
        make_trainer(tmp_path, ElsaCallback(0.5, learning_rate="auto"), *tuners, max_epochs=1).fit(net, Batches())
        rates.append(net.rates[-1])
    assert rates[0] == rates[1] != 3e-3


class Seldom(Net):
    """Steps at every third batch, by hand."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        if batch_idx % 3 == 0:
            super().training_step(batch, batch_idx)


def test_the_steps_of_a_run_can_be_said_and_the_advice_says_how_many(tmp_path: Path) -> None:
    net = Seldom()
    with pytest.warns(UserWarning, match=r"give ElsaCallback\(total_steps=10\), which is what it makes"):
        make_trainer(tmp_path, ElsaCallback(0.9), max_epochs=1).fit(net, loader(batches=30))
    net, callback = Seldom(), ElsaCallback(0.9, total_steps=10)
    make_trainer(tmp_path, callback, max_epochs=1).fit(net, loader(batches=30))
    assert callback.admm is not None and callback.admm.finished and callback.admm.step == 10
    assert sum(zeros(net.state_dict()).values()) == 7373
    with pytest.raises(UserError, match="total_steps must be 1 or more"):
        ElsaCallback(0.9, total_steps=0)


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {}])
def test_a_run_without_a_batch_is_an_error(tmp_path: Path, options: dict[str, Any]) -> None:
    data = DataLoader(Points(3), batch_size=4, drop_last=True)
    with pytest.raises(UserError, match="no batch of training data was seen, so nothing was pruned"):
        make_trainer(tmp_path, ElsaCallback(0.9), max_epochs=2, **options).fit(Net(), data)


def test_a_finished_run_may_be_resumed_without_a_step(tmp_path: Path) -> None:
    net = Net()
    make_trainer(tmp_path, ElsaCallback(0.9), every_step(tmp_path), max_steps=12).fit(net, loader())
    trainer = make_trainer(tmp_path, ElsaCallback(0.9), max_steps=12)
    trainer.fit(net, loader(), ckpt_path=str(tmp_path / "12.ckpt"), weights_only=True)
    assert sum(zeros(net.state_dict()).values()) == 7373
    trainer = make_trainer(tmp_path, ElsaCallback(0.9), max_steps=6)
    with pytest.raises(UserError, match=r"of step 6, and max_steps=6, .* leave no further one, .* after 6 of 12 steps"):
        trainer.fit(net, loader(), ckpt_path=str(tmp_path / "6.ckpt"), weights_only=True)


class Two(Net):
    """Two optimizers, of a matrix each."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.layers[index].parameters(), lr=3e-3) for index in (0, 3)]


def test_early_stopping_waits_for_the_last_of_several_masks(tmp_path: Path) -> None:
    phases: list[list[bool]] = []

    class Watches(EarlyStopping):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            phases.append([c.admm.frozen for c in callbacks if c.admm is not None])

    callbacks = [
        ElsaCallback(0.5, optimizer_index=0, frozen=0.5, ramp=0.1),
        ElsaCallback(0.5, optimizer_index=1, frozen=0.1),
    ]
    stopper = Watches("val_loss", patience=99)
    trainer = make_trainer(tmp_path, *callbacks, stopper, max_epochs=10)
    trainer.fit(Two(), loader(), loader(shuffle=False))
    assert phases and all(all(frozen) for frozen in phases)


def test_masks_of_another_callback_in_a_checkpoint_are_told_in_lightnings_words(tmp_path: Path) -> None:
    make_trainer(tmp_path, ElsaCallback(0.5, optimizer_index=0), every_step(tmp_path), max_steps=12).fit(
        Net(), loader()
    )
    with pytest.raises(UserError, match=r"holds the masks of another callback or optimizer_index.*without ckpt_path"):
        make_trainer(tmp_path, ElsaCallback(0.5), max_steps=20).fit(
            Net(), loader(), ckpt_path=str(tmp_path / "8.ckpt"), weights_only=True
        )


def test_a_module_that_trains_nothing_is_told_so(tmp_path: Path) -> None:
    class Untrained(Net):
        def configure_optimizers(self) -> Any:
            return None

    for callback in (ElsaCallback(0.5), KeepMask()):
        with pytest.raises(UserError, match="the module has no optimizer"):
            make_trainer(tmp_path, callback, max_steps=2).fit(Untrained(), loader())


class LogsLate(Net):
    """Logs a score of the validation when the training epoch ends."""

    def on_train_epoch_end(self) -> None:
        self.log("val_score", float(self.current_epoch))


def test_a_monitor_may_be_logged_when_the_epoch_ends(tmp_path: Path) -> None:
    """As in Lightning, where early stopping checks after the module's own hook."""
    stopper = EarlyStopping("val_score", mode="max", patience=99, check_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, ElsaCallback(0.9), stopper, max_epochs=4)
    trainer.fit(LogsLate(), loader(), loader(shuffle=False))
    assert trainer.current_epoch == 4 and stopper.best_score == 3


@pytest.mark.parametrize("at_epoch_end", [None, True, False])
def test_a_monitor_that_nothing_logs_is_told_long_before_the_mask_is_fixed(
    at_epoch_end: bool | None, tmp_path: Path
) -> None:
    stopper = EarlyStopping("val_los", check_on_train_epoch_end=at_epoch_end)
    trainer = make_trainer(tmp_path, ElsaCallback(0.9), stopper, max_epochs=20)
    with pytest.raises(UserError, match=r"EarlyStopping monitors 'val_los', and nothing logs that;.*val_loss"):
        trainer.fit(Net(), loader(), loader(shuffle=False))
    assert trainer.current_epoch < 2
