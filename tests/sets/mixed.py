"""A model of every layout, and runs of it that can be interrupted and resumed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from elsa_lightning import ADMM
from elsa_lightning.selection import select
from elsa_lightning.sets import Constraint


class Mixed(nn.Module):
    """A transposed layer, a kernel, a stack of matrices and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.linear = Conv1D(12, 16), nn.Linear(16, 8)
        self.kernels = nn.Conv2d(4, 6, 3)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        image = self.kernels(x.view(-1, 4, 2, 2).repeat(1, 1, 2, 2)).flatten(1)
        mixed = torch.einsum("eoi,bi->bo", self.experts, self.linear(x))
        return self.turned(x).sum(1) + image.sum(1) + mixed.sum(1)


def train(constraint: Constraint, saved: Any = None, stop: int | None = None, **options: Any) -> tuple[Mixed, ADMM]:
    """Train for twelve steps, or up to one of them, from the start or from what :func:`states` returned."""
    torch.manual_seed(0)
    model, data = Mixed(), torch.randn(12, 8, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    chosen = select(model, ["all-linear", "experts"], quiet=True).parameters
    admm = ADMM(optimizer, chosen, constraint, total_steps=12, **options)
    if saved is not None:
        for what, state in zip((model, optimizer, admm), saved, strict=True):
            what.load_state_dict(state)
    for batch in data[admm.step : stop]:
        optimizer.zero_grad()
        (model(batch) - batch.sum(1)).square().mean().backward()
        optimizer.step()
    if stop is None:
        admm.finish()
    return model, admm


def states(model: Mixed, admm: ADMM) -> tuple[dict[str, Any], ...]:
    """Return what a resumed run needs."""
    return model.state_dict(), admm.optimizer.state_dict(), admm.state_dict()
