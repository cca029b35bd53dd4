"""Runs in accelerate and Fabric go on to the bit from these libraries' own checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.selection import select
from tests.callbacks.tiny import assert_same

STEPS, AT = 24, 7
Run = Callable[[Path, int, bool], tuple[dict[str, Any], int]]


def build() -> tuple[nn.Module, torch.optim.Optimizer, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    batches = list(torch.randn(STEPS, 4, 64, generator=torch.Generator().manual_seed(1)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), batches


def end(model: nn.Module, optimizer: Any, admm: ADMM) -> tuple[dict[str, Any], int]:
    admm.finish()
    zeros = sum(int((model[index].weight == 0).sum()) for index in (0, 2))  # type: ignore[index]
    return {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "admm": admm.state_dict()}, zeros


def with_accelerate(folder: Path, first: int, saves: bool) -> tuple[dict[str, Any], int]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, batches = build()
    model, optimizer = accelerator.prepare(model, optimizer)
    admm = ADMM(optimizer, select(model).parameters, Unstructured(0.9), total_steps=STEPS)
    accelerator.register_for_checkpointing(admm)
    if first:
        accelerator.load_state(str(folder))
    for step, batch in enumerate(batches[first:], first):
        if saves and step == AT:
            accelerator.save_state(str(folder))
        optimizer.zero_grad()
        accelerator.backward(model(batch).sin().square().mean())
        optimizer.step()
    return end(model, optimizer, admm)


def with_fabric(folder: Path, first: int, saves: bool) -> tuple[dict[str, Any], int]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer, batches = build()
    wrapped, wrapping = fabric.setup(model, optimizer)
    admm = ADMM(wrapping, select(wrapped).parameters, Unstructured(0.9), total_steps=STEPS)
    state = {"model": wrapped, "optimizer": wrapping, "admm": admm}
    if first:
        fabric.load(folder / "a.ckpt", state)
    for step, batch in enumerate(batches[first:], first):
        if saves and step == AT:
            fabric.save(folder / "a.ckpt", state)
        wrapping.zero_grad()
        fabric.backward(wrapped(batch).sin().square().mean())
        wrapping.step()
    return end(model, optimizer, admm)


@pytest.mark.parametrize("run", [with_accelerate, with_fabric])
def test_a_resumed_run_is_the_run_to_the_bit(run: Run, tmp_path: Path) -> None:
    if run is with_accelerate:
        pytest.importorskip("accelerate")
    whole, zeros = run(tmp_path, 0, True)
    again, again_zeros = run(tmp_path, AT, False)
    assert_same(whole, again)
    assert zeros == again_zeros == round(0.9 * (64 * 32 + 32 * 8))
