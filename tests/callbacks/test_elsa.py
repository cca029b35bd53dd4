"""ElsaCallback in real Trainers: zeros however a run ends, figures, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from elsa_lightning import ElsaCallback, Unstructured
from tests.callbacks.pipelines import Regression, plain_loader, trainer

WEIGHTS = ("net.0.weight", "net.3.weight")


def kept(numel: int, sparsity: float) -> int:
    return numel - round(sparsity * numel)


def assert_exactly_sparse(state: dict[str, Tensor], sparsity: float) -> None:
    weights = [state[name] for name in WEIGHTS]
    assert sum(int((w != 0).sum()) for w in weights) == kept(sum(w.numel() for w in weights), sparsity)


def last_checkpoint(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    checkpoint: dict[str, Any] = torch.load(newest, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adam8bit"])
def test_prunes_any_module(optimizer: str, manual: bool) -> None:
    module = Regression(optimizer, manual=manual)
    trainer(ElsaCallback(0.9), max_steps=20).fit(module, plain_loader())
    assert_exactly_sparse(module.state_dict(), 0.9)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_every_precision_ends_with_exact_zeros(precision: str) -> None:
    module = Regression()
    trainer(ElsaCallback(0.8), max_steps=20, precision=precision).fit(module, plain_loader())
    assert_exactly_sparse(module.state_dict(), 0.8)


def test_the_real_grad_scaler_trains_and_prunes() -> None:
    from lightning.pytorch.plugins import MixedPrecision

    module = Regression()
    callback = ElsaCallback(0.8, prox="coupled", penalty=0.1)
    trainer(callback, max_steps=20, plugins=[MixedPrecision("16-mixed", "cpu")]).fit(module, plain_loader())
    assert_exactly_sparse(module.state_dict(), 0.8)
    assert callback.admm is not None and callback.admm.frozen


SAVES: dict[str, dict[str, Any]] = {
    "every step": {"every_n_train_steps": 1, "save_top_k": -1},
    "every epoch": {"every_n_epochs": 1, "save_top_k": -1, "save_on_train_epoch_end": True},
    "after validation": {"monitor": "val_loss", "save_top_k": -1, "save_on_train_epoch_end": False},
    "last only": {"every_n_train_steps": 1, "save_last": True, "save_top_k": 0},
}
ENDS: dict[str, dict[str, Any]] = {
    "max_steps": {"max_steps": 20},
    "max_steps on an epoch's way": {"max_steps": 27, "val_check_interval": 9, "check_val_every_n_epoch": None},
    "max_epochs": {"max_epochs": 2},
    "max_epochs, accumulating": {"max_epochs": 2, "accumulate_grad_batches": 3},
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("save", SAVES)
def test_the_last_checkpoint_of_a_planned_end_has_the_zeros(end: str, save: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, **SAVES[save])
    module = Regression()
    callback = ElsaCallback(0.8, frozen=0, ramp=0)
    trainer(checkpoint, callback, **ENDS[end]).fit(module, plain_loader(), plain_loader(batches=2))
    assert_exactly_sparse(module.state_dict(), 0.8)
    assert callback.admm is not None and callback.admm.finished
    if end == "max_steps on an epoch's way" and save in ("every epoch", "after validation"):
        return  # Lightning saves nothing at such an end
    saved = last_checkpoint(tmp_path)
    assert_exactly_sparse(saved["state_dict"], 0.8)
    assert saved["callbacks"]["ElsaCallback"]["admm"]["phase"] == "finished"


def test_accumulation_gives_the_large_batch() -> None:
    results = []
    for size, accumulate in ((8, 1), (2, 4)):
        seed_everything(0, verbose=False)
        module = Regression("sgd", dropout=0).double()
        run = trainer(ElsaCallback(0.8), max_steps=20, accumulate_grad_batches=accumulate, precision="64-true")
        run.fit(module, plain_loader(size, 80 // size))
        results.append(module.net[0].weight.detach())
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


class Norms(Callback):
    """Records the gradient norm that clipping leaves, and that it was given."""

    def __init__(self) -> None:
        self.before: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.before.append(math.sqrt(sum(float(p.grad.square().sum()) for p in pl_module.parameters())))


def test_clipping_never_sees_the_proximal_gradient() -> None:
    """With the weights held still, the norms before clipping are those of the loss alone."""
    results = []
    for penalty in (0.0, 1e4):
        seed_everything(0, verbose=False)
        norms = Norms()
        module = Regression("sgd", dropout=0)
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.0)  # type: ignore[method-assign]
        callback = ElsaCallback(0.8, prox="coupled", penalty=penalty, penalty_schedule="constant", frozen=0, ramp=0)
        trainer(callback, norms, max_steps=9, gradient_clip_val=1e-3).fit(module, plain_loader())
        results.append(norms.before)
    assert results[0] == results[1]


def test_figures_of_every_update_reach_loggers_and_monitors(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, table = TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")
    callback = ElsaCallback(0.8, interval=3, frozen=0.5)
    run = trainer(callback, max_steps=40, logger=[board, table], log_every_n_steps=1000, enable_progress_bar=True)
    run.fit(Regression(), plain_loader())
    names = {f"elsa/{name}" for name in ("primal_residual", "dual_residual", "mask_flips", "sparsity", "penalty")}
    assert names <= run.callback_metrics.keys()
    assert {"elsa/primal_residual", "elsa/sparsity"} <= run.progress_bar_metrics.keys()
    events = EventAccumulator(board.log_dir).Reload()
    for name in names:
        assert [event.step for event in events.Scalars(name)] == [1, 3, 6, 9, 12, 15, 18, 20]
    assert events.Scalars("elsa/sparsity")[-1].value == pytest.approx(0.8, abs=0.01)
    assert "elsa/masks" in events.Tags()["images"]
    assert "elsa/primal_residual" in (Path(table.log_dir) / "metrics.csv").read_text()


def test_coverage_is_said_before_training(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(ElsaCallback(0.8), max_steps=1).fit(Regression(), plain_loader())
    assert "2 tensors constrained: 576 of 608 parameters (94.7%)" in caplog.text


def test_left_out_matrices_are_a_loud_warning() -> None:
    class Fused(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.ones(4, 16, 24))

    with pytest.warns(UserWarning, match=r"LOW COVERAGE: 1,536 of the 2,112 .*(?s:.)*experts .*1,536"):
        trainer(ElsaCallback(0.8), max_steps=1).fit(Fused(), plain_loader())
    module = Fused()
    trainer(ElsaCallback(0.5, targets=["experts"]), max_steps=1).fit(module, plain_loader())
    assert int((module.experts != 0).sum()) == 768
    assert int((module.net[0].weight == 0).sum()) == 0


class TwoOptimizers(Regression):
    """Each layer has an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__(manual=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net[0].parameters()), torch.optim.Adam(self.net[3].parameters())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(batch[0]).square().mean())
            optimizer.step()


@pytest.mark.parametrize("end", [{"max_steps": 40}, {"max_epochs": 2}])
def test_one_of_several_optimizers_is_chosen_by_index(end: dict[str, int]) -> None:
    module = TwoOptimizers()
    callback = ElsaCallback(0.8, targets=[r"net\.3\.weight"], optimizer_index=1)
    trainer(callback, **end).fit(module, plain_loader())
    assert int((module.net[3].weight != 0).sum()) == kept(192, 0.8)
    assert int((module.net[0].weight == 0).sum()) == 0
    assert callback.admm is not None and callback.admm.step == callback.admm.total_steps == 20
    assert callback.admm.finished
    for index, message in ((None, "2 optimizers.*optimizer_index"), (2, "optimizer_index is 2, .*0: Adam, 1: Adam")):
        with pytest.raises(ValueError, match=message):
            trainer(ElsaCallback(0.8, optimizer_index=index), max_steps=2).fit(TwoOptimizers(), plain_loader())
    other = TwoOptimizers()
    trainer(ElsaCallback(0.8, optimizer_index=0), **end).fit(other, plain_loader())  # all that it trains
    assert int((other.net[0].weight != 0).sum()) == kept(384, 0.8)
    assert int((other.net[3].weight == 0).sum()) == 0


class Endless(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Any:
        while True:
            yield [torch.randn(16)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": -1}, "how long the run is.*max_steps"),
        ({"callbacks": [ModelPruning("l1_unstructured", amount=0.5)]}, "remove ModelPruning"),
        ({"callbacks": [StochasticWeightAveraging(1e-2)]}, "remove StochasticWeightAveraging"),
        ({"callbacks": [WeightAveraging()]}, "remove WeightAveraging"),
    ],
)
def test_a_trainer_that_cannot_work_is_refused_at_setup(options: dict[str, Any], message: str) -> None:
    callbacks = options.pop("callbacks", [])
    with pytest.raises(ValueError, match=message):
        trainer(ElsaCallback(0.8), *callbacks, **{"max_steps": -1 if options else 5, **options}).fit(
            Regression(), plain_loader()
        )


def test_a_second_elsa_callback_is_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ElsaCallback`"):
        trainer(ElsaCallback(0.8), ElsaCallback(0.5))


def test_data_without_a_length_needs_max_steps() -> None:
    data: DataLoader[Any] = DataLoader(Endless(), batch_size=2)
    with pytest.raises(ValueError, match="this data has no length: set the Trainer's max_steps"):
        trainer(ElsaCallback(0.8), max_epochs=1).fit(Regression(), data)
    module = Regression()
    trainer(ElsaCallback(0.8), max_steps=6).fit(module, data)
    assert_exactly_sparse(module.state_dict(), 0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give sparsity .* or constraint, one of the two"),
        ({"sparsity": 0.5, "constraint": Unstructured(0.5)}, "one of the two"),
        ({"sparsity": 90}, r"in \[0, 1\), got 90; for 90 % give 0.9"),
        ({"sparsity": 0.9, "interval": 0}, "interval must be 1 or more"),
        ({"sparsity": 0.9, "penalty_schedule": "sudden"}, "penalty_schedule must be one of"),
        ({"sparsity": 0.9, "ramp": 0.9}, "ramp and frozen are fractions"),
        ({"sparsity": 0.9, "prox": "none"}, "prox must be one of"),
    ],
)
def test_bad_arguments_are_refused_when_the_callback_is_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElsaCallback(**arguments)


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="targets: 'no_such_layer' matches no parameter"):
        trainer(ElsaCallback(0.8, targets=["no_such_layer"]), max_steps=1).fit(Regression(), plain_loader())


def test_a_diverged_run_says_so() -> None:
    module = Regression("sgd", scale=1e30)
    with pytest.raises(ValueError, match=r"no longer finite: the loss diverged\. Lower the learning rate"):
        trainer(ElsaCallback(0.8, interval=1), max_steps=50).fit(module, plain_loader())


def test_a_boring_model_and_a_second_fit() -> None:
    model = BoringModel()
    callback = ElsaCallback(constraint=Unstructured(0.5))
    for _ in range(2):
        trainer(callback, max_steps=8).fit(model)
        assert int((model.layer.weight != 0).sum()) == 32
