"""A small module with dropout, data that resumes, and Trainers without noise: what the callback tests train."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Dataset

from elsa_lightning import ElsaCallback
from elsa_lightning.lm.data import ResumableLoader, ResumableSampler

WIDTH = 64  # bitsandbytes keeps 8-bit moments from 4096 entries on
BATCHES = 6  # an epoch


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=3e-3)


def adam8bit(params: Any) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(params, lr=3e-3)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {"adam": adam, "adam8bit": adam8bit, "sgd": sgd}


class Points(Dataset[Tensor]):
    """Fixed random inputs."""

    def __init__(self, length: int, width: int = WIDTH) -> None:
        self.data = torch.randn(length, width, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]


def loader(batches: int = BATCHES, batch_size: int = 4, shuffle: bool = True) -> ResumableLoader:
    data = Points(batches * batch_size)
    return ResumableLoader(
        data, batch_size=batch_size, sampler=ResumableSampler(data, 1, 0, shuffle=shuffle, drop_last=True)
    )


class Net(LightningModule):
    """Two matrices and dropout, regressed on a fixed function of the inputs."""

    def __init__(self, optimizer: str = "adam", dropout: float = 0.2, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.name = optimizer
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(dropout), nn.Linear(WIDTH, WIDTH, bias=False)
        )

    def loss(self, batch: Tensor) -> Tensor:
        dtype = self.layers[3].weight.dtype
        error = self.layers(batch.to(dtype)) - batch.sin().flip(-1)  # type: ignore[arg-type]
        return error.to(torch.promote_types(dtype, torch.float32)).square().mean()  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.name](self.parameters())
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7), "interval": "step"}]


class At(Callback):
    """Does something right after an optimizer step, once."""

    def __init__(self, step: int, action: Callable[[Trainer], None]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            self.action(trainer)


class Crash(Exception):
    """What a machine does."""


def crash(trainer: Trainer) -> None:
    raise Crash


def interrupt(trainer: Trainer) -> None:
    raise KeyboardInterrupt


def stop(trainer: Trainer) -> None:
    trainer.should_stop = True


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """Return a quiet Trainer on one CPU process."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": folder,
    }  # fmt: skip
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        quiet["enable_checkpointing"] = False
    return Trainer(**(quiet | {"callbacks": list(callbacks)} | options))


def every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    """Return a ModelCheckpoint that keeps ``{step}.ckpt`` after every optimizer step."""
    return ModelCheckpoint(
        folder, "{step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1, **options
    )


def load(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint, read in the way that runs no code."""
    return torch.load(checkpoint, weights_only=True)  # type: ignore[no-any-return]


def fit(
    folder: Path,
    *callbacks: Callback,
    net: dict[str, Any] | None = None,
    elsa: dict[str, Any] | None = None,
    resume: Path | None = None,
    **options: Any,
) -> tuple[Net, ElsaCallback]:
    """Prune a fresh :class:`Net` to 90 % in 20 steps of three epochs and a bit, or as told."""
    seed_everything(1, verbose=False)
    model = Net(**(net or {}))
    callback = ElsaCallback(**({"sparsity": 0.9, "interval": 3} | (elsa or {})))
    limits = {"max_steps": 20} if not {"max_steps", "max_epochs"} & options.keys() else {}
    batch_size = options.pop("batch_size", 4)
    validation = options.pop("validation", None)
    trainer = make_trainer(folder, callback, *callbacks, **limits, **options)
    trainer.fit(model, loader(batch_size=batch_size), validation, ckpt_path=resume)
    return model, callback


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Fail unless two nested states are equal to the bit, dtypes included."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, f"{where}: {a.dtype} and {b.dtype}"
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    else:
        assert a == b, f"{where}: {a} and {b}"


def assert_same_run(a: Path, b: Path) -> None:
    """Fail unless two checkpoints hold the same weights, optimizer states and state of the callback."""
    one, other = load(a), load(b)
    assert one["global_step"] == other["global_step"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(one[key], other[key], key)
    assert_same(one["callbacks"]["ElsaCallback"], other["callbacks"]["ElsaCallback"], "ElsaCallback")


def zeros(state: dict[str, Tensor]) -> dict[str, int]:
    """Return how many exact zeros each matrix has."""
    return {name: int((p == 0).sum()) for name, p in state.items() if p.dim() > 1}


def hang(trainer: Trainer) -> None:
    Path(trainer.default_root_dir, "hanging").touch()
    time.sleep(600)


if __name__ == "__main__":  # python tiny.py FOLDER [CHECKPOINT]: hangs after step 11, or goes on and ends
    torch.set_num_threads(1)
    target, *checkpoint = map(Path, sys.argv[1:])
    fit(target, every_step(target), *([] if checkpoint else [At(12, hang)]), resume=next(iter(checkpoint), None))
