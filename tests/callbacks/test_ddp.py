"""Two processes get the results of one process on all their data: λ has the same meaning at any world size."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy

from elsa_lightning import ElsaCallback
from elsa_lightning.callbacks import SaveHuggingFace
from elsa_lightning.lm.data import ResumableLoader, ResumableSampler
from tests.callbacks.tiny import Net, Points, assert_same, every_step, load, make_trainer, zeros

STEPS = 12


class Model:
    """What SaveHuggingFace asks of a model; each call leaves a trace."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        with (folder.parent.parent / "saved.txt").open("a") as trace:
            trace.write("saved\n")


class NetWithModel(Net):
    """A module that SaveHuggingFace accepts; each of its steps sees 8 samples, however many processes share them."""

    model = Model()

    def __init__(self) -> None:
        super().__init__(dropout=0)

    def train_dataloader(self) -> ResumableLoader:
        data, world = Points(STEPS * 8), self.trainer.world_size
        sampler = ResumableSampler(data, num_replicas=world, rank=self.trainer.global_rank, shuffle=False)
        return ResumableLoader(data, batch_size=8 // world, sampler=sampler)


class WeightsOfEachRank(Callback):
    """Writes what every process ends with."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = {"weights": pl_module.state_dict(), "shown": sorted(trainer.callback_metrics)}
        torch.save(state, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


def fit(folder: Path, devices: int, resume: Path | None = None) -> Path:
    seed_everything(1, verbose=False)
    elsa = ElsaCallback(sparsity=0.9, interval=2, prox="coupled", penalty=0.05, penalty_schedule="constant")
    callbacks = [elsa, every_step(folder), WeightsOfEachRank(), SaveHuggingFace(str(folder / "hf"))]
    strategy = "ddp_spawn" if devices > 1 else "auto"
    trainer = make_trainer(folder, *callbacks, devices=devices, strategy=strategy, precision="64-true", max_steps=STEPS)
    trainer.fit(NetWithModel(), ckpt_path=resume)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("two"), devices=2)


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert zeros(a) == zeros(b) and sum(zeros(a).values()) == 7373  # 90 % of 8192
    for name, p in a.items():
        torch.testing.assert_close(p, b[name], rtol=1e-7, atol=1e-9)


def test_two_processes_equal_one_with_twice_the_batch(two: Path, tmp_path: Path) -> None:
    one = load(fit(tmp_path, devices=1) / "rank0.pt")
    first, second = load(two / "rank0.pt"), load(two / "rank1.pt")
    assert_same(first, second)
    assert_close(first["weights"], one["weights"])
    assert_same(dict(load(two / f"{STEPS}.ckpt")["state_dict"]), dict(first["weights"]))
    assert "elsa/primal_residual" in first["shown"]  # on every process, for monitors that decide together
    assert (two / "saved.txt").read_text() == "saved\n"  # by one of the two


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_of_two_processes_resumes_in_one(step: int, two: Path, tmp_path: Path) -> None:
    resumed = load(fit(tmp_path, devices=1, resume=two / f"{step}.ckpt") / "rank0.pt")
    assert_close(resumed["weights"], load(two / "rank0.pt")["weights"])


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (object.__new__(DeepSpeedStrategy), r"not with DeepSpeedStrategy.*use .*ModelParallelStrategy"),
        (FSDPStrategy(use_orig_params=False), r"needs FSDPStrategy with use_orig_params=True"),
    ],
)
def test_a_strategy_that_hides_the_weights_is_refused(strategy: Strategy, message: str, tmp_path: Path) -> None:
    """A Trainer with these strategies needs GPUs, so the check is called directly."""
    trainer = make_trainer(tmp_path, ElsaCallback(sparsity=0.9), max_steps=1)
    trainer._accelerator_connector.strategy = strategy
    with pytest.raises(ValueError, match=message):
        ElsaCallback(sparsity=0.9).setup(trainer, Net(), "fit")
