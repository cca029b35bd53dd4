"""Zeros that other code would undo, checkpoints that could be mistaken for sparse ones, and steps of other code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning import ADMM, ElsaCallback, Unstructured
from elsa_lightning.errors import UserError
from elsa_lightning.schedule import Schedule
from tests.callbacks.tiny import BATCHES, At, Net, assert_same_run, every_step, fit, load, loader, make_trainer, stop
from tests.callbacks.tiny import zeros as zeros_of

WEIGHTS = ("layers.0.weight", "layers.3.weight")
CUT = 2 * 64 * 64 - round(0.1 * 2 * 64 * 64)  # of both


class ScheduleFree(Optimizer):
    """SGD that trains at y = (1 − β) z + β x, a mean x of its points z, and holds x in evaluation."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "trains": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            assert group["trains"], "train() first"
            group["k"] += 1
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                z = state.setdefault("z", y.clone())
                x = (y - (1 - group["beta"]) * z) / group["beta"]
                z.sub_(y.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                y.copy_(group["beta"] * x + (1 - group["beta"]) * z)
        return loss

    @torch.no_grad()
    def _swap(self, trains: bool) -> None:
        for group in self.param_groups:
            if group["trains"] != trains:
                group["trains"] = trains
                weight = 1 - group["beta"] if trains else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)


class Swapping(Net):
    """Uses ScheduleFree as its authors recommend, and counts the zeros during validation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, int]]] = []

    def configure_optimizers(self) -> Any:
        return ScheduleFree(self.parameters())

    def on_fit_start(self) -> None:
        self.optimizers().optimizer.train()

    on_validation_end = on_fit_start

    def on_validation_start(self) -> None:
        self.optimizers().optimizer.eval()

    on_train_end = on_validation_start

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen.append((self.trainer.global_step, zeros_of(dict(self.named_parameters()))))


def test_weights_that_the_optimizer_swaps_in_are_sparse_from_when_the_mask_is_fixed(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model, callback = Swapping(), ElsaCallback(0.9, interval=3)
    trainer = make_trainer(tmp_path, callback, every_step(tmp_path), max_epochs=5)
    trainer.fit(model, loader(), loader(shuffle=False))
    late = [zeros for step, zeros in model.seen if step > 18]
    assert late
    assert all(sum(zeros[name] for name in WEIGHTS) == CUT for zeros in late)
    assert sum(zeros_of(dict(model.named_parameters()))[name] for name in WEIGHTS) == CUT
    saved = load(tmp_path / f"{trainer.global_step}.ckpt")
    assert sum(zeros_of(saved["state_dict"])[name] for name in WEIGHTS) == CUT


def test_a_plain_loop_may_swap_after_the_end() -> None:
    torch.manual_seed(0)
    layer, data = nn.Linear(16, 16, bias=False), torch.randn(200, 8, 16)
    optimizer = ScheduleFree(layer.parameters())
    admm = ADMM(optimizer, {"weight": layer.weight}, Unstructured(0.9), total_steps=200)
    for batch in data:
        optimizer.zero_grad()
        (layer(batch) - batch.flip(-1)).square().mean().backward()
        optimizer.step()
    admm.finish()
    optimizer.eval()
    assert int((layer.weight == 0).sum()) == 256 - 26
    assert admm.stray() == 0


def test_finish_called_again_puts_zeros_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(16, 16, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    admm = ADMM(optimizer, {"weight": layer.weight}, Unstructured(0.9), total_steps=10)
    for _ in range(10):
        layer(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    admm.finish()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert admm.stray() == 256 - 26
    admm.finish()
    assert "230 weights off the mask had been moved" in caplog.text
    assert torch.equal(layer.weight == 0, before == 0)


class Averaging(Net):
    """Swaps in averaged weights at a time of its own, and back after validation."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.mean, self.own = when, {}, {}  # type: ignore[var-annotated]
        self.seen: list[tuple[int, dict[str, int]]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for name, p in self.named_parameters():
                self.mean.setdefault(name, p.clone()).lerp_(p, 0.1)
                if self.when == "batch":
                    p.lerp_(self.mean[name], 0.1)

    def _swap_in(self) -> None:
        with torch.no_grad():
            for name, p in self.named_parameters():
                self.own[name] = p.clone()
                p.copy_(self.mean[name])

    def on_validation_start(self) -> None:
        if self.when == "validation" and self.mean:
            self._swap_in()

    def on_validation_end(self) -> None:
        with torch.no_grad():
            for name, p in self.named_parameters():
                if self.when == "validation" and self.mean:
                    p.copy_(self.own[name])

    def on_train_end(self) -> None:
        if self.when == "end":
            self._swap_in()

    def on_fit_end(self) -> None:
        if self.when == "fit end":
            self._swap_in()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.seen.append((self.trainer.global_step, zeros_of(dict(self.named_parameters()))))


@pytest.mark.parametrize("when", ["batch", "validation", "end", "fit end"])
def test_weights_that_a_module_moves_are_sparse_again_and_it_is_told(when: str, tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model, callback = Averaging(when), ElsaCallback(0.9, interval=3)
    saver = every_step(tmp_path)
    trainer = make_trainer(tmp_path, callback, saver, max_epochs=5)
    with pytest.warns(UserWarning, match=r"weights that the mask does not keep were moved .* are 0 again"):
        trainer.fit(model, loader(), loader(shuffle=False))
    assert sum(zeros_of(dict(model.named_parameters()))[name] for name in WEIGHTS) == CUT
    late = [zeros for step, zeros in model.seen if step > 18]
    assert all(sum(zeros[name] for name in WEIGHTS) == CUT for zeros in late)
    saved = load(tmp_path / f"{trainer.global_step}.ckpt")
    assert sum(zeros_of(saved["state_dict"])[name] for name in WEIGHTS) == CUT


# ---------------------------------------------------------------------- monitors


class Densest(Net):
    """Validates best while it is dense."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        zeros = sum(zeros_of(dict(self.named_parameters())).values())
        self.log("val_loss", float(zeros) + 1e-3 * self.trainer.global_step)
        self.log("val_score", -float(zeros) - 1e-3 * self.trainer.global_step)


@pytest.mark.parametrize(("monitor", "mode"), [("val_loss", "min"), ("val_score", "max")])
@pytest.mark.parametrize("keep", [1, 2, -1])
@pytest.mark.parametrize("name", ["best", "{epoch}"])
def test_the_best_checkpoint_is_sparse(monitor: str, mode: str, keep: int, name: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, name, monitor=monitor, mode=mode, save_top_k=keep, save_last=True)
    trainer = make_trainer(tmp_path, ElsaCallback(0.9, interval=3), saver, max_epochs=6)
    model = Densest()
    trainer.fit(model, loader(), loader(shuffle=False))
    best = load(Path(saver.best_model_path))
    assert best["global_step"] >= round(0.6 * 6 * BATCHES)
    assert sum(zeros_of(best["state_dict"])[name] for name in WEIGHTS) == CUT
    trainer.test(model, loader(shuffle=False), ckpt_path="best", verbose=False)
    assert sum(zeros_of(dict(model.named_parameters()))[name] for name in WEIGHTS) == CUT
    if keep == 1 and name == "best":
        assert Path(saver.best_model_path).name == "best.ckpt"


Densest.test_step = Densest.validation_step  # type: ignore[attr-defined]


def test_a_run_that_is_resumed_while_dense_has_a_sparse_best_too(tmp_path: Path) -> None:
    def saver(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, "{epoch}", monitor="val_loss", save_top_k=1, save_last=True)

    first = make_trainer(tmp_path, ElsaCallback(0.9), saver("a"), max_epochs=6, limit_train_batches=BATCHES)
    first.fit_loop.max_epochs = 6
    first.callbacks.insert(0, At(2 * BATCHES, stop))
    first.fit(Densest(), loader(), loader(shuffle=False))
    second_saver = saver("a")
    second = make_trainer(tmp_path, ElsaCallback(0.9), second_saver, max_epochs=6)
    second.fit(Densest(), loader(), loader(shuffle=False), ckpt_path=tmp_path / "a" / "last.ckpt")
    best = load(Path(second_saver.best_model_path))
    assert sum(zeros_of(best["state_dict"])[name] for name in WEIGHTS) == CUT


@pytest.mark.parametrize("resumed", [False, True])
def test_no_checkpoint_is_best_by_a_validation_before_the_mask(resumed: bool, tmp_path: Path) -> None:
    """Those of the steps between the mask and the next validation are sparse, but have the metric of a denser model."""

    def run(resume: Path | None = None) -> ModelCheckpoint:
        saver = ModelCheckpoint(tmp_path, "best-{step}", monitor="val_loss", every_n_train_steps=1)
        trainer = make_trainer(tmp_path, ElsaCallback(0.9, interval=3), saver, every_step(tmp_path), max_epochs=6)
        trainer.fit(Densest(), loader(), loader(shuffle=False), ckpt_path=resume)
        return saver

    saver = run()
    if resumed:
        saver = run(tmp_path / "23.ckpt")  # the mask is fixed after 22 steps, an epoch has 6
    assert Path(saver.best_model_path).stem.removesuffix("-v1") == "best-step=25"  # it may be there already
    assert saver.best_model_score is not None and float(saver.best_model_score) == pytest.approx(CUT + 0.024)


def test_early_stopping_takes_no_validation_from_before_the_mask(tmp_path: Path) -> None:
    stopper = EarlyStopping("val_loss", patience=99, check_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path, ElsaCallback(0.9), stopper, max_epochs=9, check_val_every_n_epoch=4)
    trainer.fit(Densest(), loader(), loader(shuffle=False))  # validated after steps 24 and 48, fixed after 33
    assert float(stopper.best_score) == pytest.approx(CUT + 0.048)


def test_what_training_logs_counts_as_soon_as_the_mask_is_fixed(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", monitor="falling", every_n_train_steps=1)

    class Falls(Densest):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("falling", float(self.trainer.global_step))
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, ElsaCallback(0.9, interval=3), saver, max_epochs=6)
    trainer.fit(Falls(), loader(), loader(shuffle=False))
    assert Path(saver.best_model_path).name == "step=22.ckpt"


def test_early_stopping_waits_for_the_mask_and_then_stops(tmp_path: Path) -> None:
    stopper = EarlyStopping("val_loss", patience=1)
    after: list[Callback] = [Callback(), Callback()]
    trainer = make_trainer(tmp_path, after[0], stopper, after[1], ElsaCallback(0.9, frozen=0.5), max_epochs=12)
    model = Densest()
    trainer.fit(model, loader(), loader(shuffle=False))
    assert stopper.stopped_epoch == 6  # the mask is fixed after the last step of epoch 5, and the loss rises
    own = [c for c in trainer.callbacks if c in (after[0], stopper, after[1])]
    assert own == [after[0], stopper, after[1]]
    assert sum(zeros_of(dict(model.named_parameters()))[name] for name in WEIGHTS) == CUT


def test_a_threshold_that_the_dense_model_reaches_stops_nothing(tmp_path: Path) -> None:
    stopper = EarlyStopping("val_loss", stopping_threshold=1000.0)
    trainer = make_trainer(tmp_path, stopper, ElsaCallback(0.9), max_epochs=6)
    trainer.fit(Densest(), loader(), loader(shuffle=False))
    assert trainer.current_epoch == 6


def test_a_run_that_ends_before_its_mask_is_fixed_has_no_best(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(tmp_path, ElsaCallback(0.9), saver, At(2 * BATCHES, stop), max_epochs=6)
    model = Densest()
    with pytest.warns(UserWarning, match="no checkpoint is the best one"):
        trainer.fit(model, loader(), loader(shuffle=False))
    with pytest.raises(ValueError, match="best"):
        trainer.test(model, loader(shuffle=False), ckpt_path="best", verbose=False)


def test_early_stopping_without_a_frozen_phase_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EarlyStopping("val_loss"), ElsaCallback(0.9, frozen=0), max_epochs=2)
    with pytest.raises(UserError, match="frozen above 0"):
        trainer.fit(Densest(), loader(), loader(shuffle=False))


def test_without_a_frozen_phase_the_last_is_the_best(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    make_trainer(tmp_path, saver, ElsaCallback(0.9, frozen=0), max_epochs=3).fit(
        Densest(), loader(), loader(shuffle=False)
    )
    best = load(Path(saver.best_model_path))
    assert sum(zeros_of(best["state_dict"])[name] for name in WEIGHTS) == CUT


def test_a_saver_that_keeps_the_latest_by_step_is_left_alone(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", monitor="step", mode="max", save_top_k=2, every_n_train_steps=1)
    fit(tmp_path, saver, elsa={"frozen": 0})
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=19.ckpt", "step=20.ckpt"]


class Plateau(Densest):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_a_rate_that_falls_at_a_plateau_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ReduceLROnPlateau takes the rising sparsity"):
        make_trainer(tmp_path, ElsaCallback(0.9), max_epochs=2).fit(Plateau(), loader(), loader(shuffle=False))


# ---------------------------------------------------------------------- the last checkpoint


class StopsLast(Callback):
    """Asks to stop after the saver saved."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == 7


@pytest.mark.parametrize("where", ["memory", "asynchronous"])
def test_the_last_checkpoint_has_the_zeros_wherever_it_is(where: str, tmp_path: Path) -> None:
    import fsspec

    folder = f"memory://{tmp_path.name}" if where == "memory" else str(tmp_path)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    plugins = [AsyncCheckpointIO()] if where == "asynchronous" else []
    trainer = make_trainer(tmp_path, ElsaCallback(0.9, interval=3), saver, max_steps=20, plugins=plugins)
    trainer.callbacks.append(StopsLast())
    trainer.fit(Net(), loader())
    with fsspec.open(f"{folder}/7.ckpt", "rb") as file:
        saved = torch.load(file, weights_only=True)
    assert sum(zeros_of(saved["state_dict"])[name] for name in WEIGHTS) == CUT


# ---------------------------------------------------------------------- steps of others


class FindsAtEpoch(LearningRateFinder):
    """Lightning's documented finder at epochs of one's own."""

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1 and not self.optimal_lr:
            self.lr_find(trainer, pl_module)


class Tunable(Net):
    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.lr = 3e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def test_steps_of_a_learning_rate_finder_do_not_count(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    callback, folder = ElsaCallback(0.9, interval=3), tmp_path / "a"
    finder = FindsAtEpoch(num_training_steps=15, early_stop_threshold=None, update_attr=False)
    trainer = make_trainer(folder, finder, callback, every_step(folder), max_epochs=5)
    trainer.fit(Tunable(), loader())
    assert callback.admm is not None
    assert (callback.admm.step, callback.admm.total_steps) == (5 * BATCHES, 5 * BATCHES)
    assert load(folder / "12.ckpt")["callbacks"]["ElsaCallback"]["admm"]["step"] == 12
    seed_everything(2, verbose=False)
    again = make_trainer(tmp_path / "b", ElsaCallback(0.9, interval=3), every_step(tmp_path / "b"), max_epochs=5)
    again.fit(Tunable(), loader(), ckpt_path=folder / "12.ckpt")  # Lightning draws the finder's epoch anew
    assert_same_run(folder / "30.ckpt", tmp_path / "b" / "30.ckpt")


def test_accumulation_that_changes_is_planned(tmp_path: Path) -> None:
    schedule = GradientAccumulationScheduler({0: 1, 2: 3})
    model, callback = fit(tmp_path, schedule, max_epochs=5)
    assert callback.admm is not None
    assert callback.admm.total_steps == callback.admm.step == 2 * BATCHES + 3 * BATCHES // 3
    assert sum(zeros_of(dict(model.named_parameters()))[name] for name in WEIGHTS) == CUT


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (20, "still moving, and is cut at once"),
        (70, "the frozen phase, from step 60 on, was cut short"),
        (98, ""),
        (100, ""),
        (110, "the schedule was over after total_steps=100"),
    ],
)
def test_a_loop_that_is_off_its_schedule_is_told(made: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    admm = ADMM(optimizer, {"weight": layer.weight}, Unstructured(0.5), total_steps=100, schedule=Schedule())
    for _ in range(made):
        layer(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    admm.finish()
    assert said in caplog.text
    assert bool(said) == ("total_steps=100" in caplog.text)


# ---------------------------------------------------------------------- copies of the module, several callbacks


class Copying(Callback):
    """Pickles and copies the module in the middle of fit."""

    copies: list[LightningModule]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 3:
            duplicate = copy.deepcopy(pl_module)
            self.copies = [duplicate, pickle.loads(pickle.dumps(pl_module)), pickle.loads(pickle.dumps(duplicate))]


def test_a_module_can_be_pickled_and_copied_while_it_is_pruned(tmp_path: Path) -> None:
    copying = Copying()
    model, _ = fit(tmp_path, copying)
    for duplicate in copying.copies:
        state = duplicate.state_dict()
        assert state.keys() == model.state_dict().keys()
        torch.save(duplicate, tmp_path / "module.pt")


class Gan(LightningModule):
    """Two networks, each with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(64, 64), nn.Linear(64, 64)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, net in zip(self.optimizers(), (self.generator, self.critic), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward((net(batch) - batch.flip(-1)).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-2) for net in (self.generator, self.critic)]


def both() -> Iterator[ElsaCallback]:
    yield ElsaCallback(0.9, optimizer_index=0, targets=["generator.weight"], interval=2)
    yield ElsaCallback(0.5, optimizer_index=1, targets=["critic.weight"], interval=2)


def test_each_optimizer_has_its_callback_and_both_resume(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> Gan:
        seed_everything(3, verbose=False)
        model = Gan()
        trainer = make_trainer(folder, *both(), every_step(folder), max_epochs=4)
        trainer.fit(model, loader(), ckpt_path=resume)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert logged["elsa_0/sparsity"] == pytest.approx(0.9, abs=1e-3)
        assert logged["elsa_1/sparsity"] == pytest.approx(0.5, abs=1e-3)
        return model

    model = run(tmp_path / "a")
    assert int((model.generator.weight == 0).sum()) == 3686  # 90 % of 4096
    assert int((model.critic.weight == 0).sum()) == 2048
    middle = sorted((tmp_path / "a").glob("*.ckpt"), key=lambda p: int(p.stem))[9]
    resumed = run(tmp_path / "b", middle)
    for name, p in resumed.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


def test_two_callbacks_of_one_optimizer_are_refused(tmp_path: Path) -> None:
    callbacks = [ElsaCallback(0.9, optimizer_index=0, targets=["0"]), ElsaCallback(0.9, targets=["3"])]
    with pytest.raises(UserError, match="two ElsaCallbacks constrain the weights of one optimizer"):
        make_trainer(tmp_path, *callbacks, max_steps=2).fit(Net(), loader())
