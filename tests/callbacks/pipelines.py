"""A small module and its data for the callback's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}


class Regression(LightningModule):
    """A two-layer network with dropout; the Linear layers are ``net.0`` (24, 16) and ``net.3`` (8, 24)."""

    def __init__(self, optimizer: str = "adam", dropout: float = 0.1, manual: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 8))
        self.optimizer, self.scale = optimizer, scale
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        loss = (self.net(x) - x[:, :8].roll(1, -1)).square().mean() * self.scale
        self.losses.append(float(loss))
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch[0])).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adam8bit":
            import bitsandbytes

            return bitsandbytes.optim.Adam8bit(self.parameters(), lr=1e-2, min_8bit_size=128)
        return OPTIMIZERS[self.optimizer](self.parameters())


def plain_loader(batch_size: int = 4, batches: int = 10) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(batch_size * batches, 16, generator=torch.Generator().manual_seed(0)))
    return DataLoader(data, batch_size=batch_size)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }  # fmt: skip
    return Trainer(**{**quiet, **options}, callbacks=list(callbacks))
