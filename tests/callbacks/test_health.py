"""Runs that go wrong say so, with the setting to change; runs that do not are quiet."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elsa_lightning import ElsaCallback, Unstructured
from tests.callbacks.pipelines import Regression, plain_loader, trainer


def said(callback: ElsaCallback, module: Any = None, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, **{"max_steps": 60, **options}).fit(module or Regression(), plain_loader())
    return [str(w.message) for w in caught if str(w.message).startswith("Elsa, step")]


def test_a_run_that_goes_well_is_quiet() -> None:
    assert said(ElsaCallback(0.7)) == []


def test_a_residual_that_stays_open_is_told_before_it_is_cut_off() -> None:
    messages = said(ElsaCallback(0.9, prox="coupled", penalty=1e-6, ramp=0, frozen=0.2, interval=4))
    (message,) = [m for m in messages if "away from the constraint" in m]
    assert "after step 48" in message and "Raise penalty (now 1e-06)" in message


def test_a_mask_that_still_moves_is_told() -> None:
    class Restless(Regression):
        """Weights that are drawn anew at every step."""

        @torch.no_grad()
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            for p in self.parameters():
                p.normal_()

    messages = said(ElsaCallback(0.8, interval=4), Restless())
    assert any("the mask still moves" in m for m in messages)


def test_a_loss_that_rises_is_told() -> None:
    class Diverging(Regression):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * (1 + self.global_step) ** 2

    messages = said(ElsaCallback(0.8, interval=4, ramp=0.1, frozen=0.1), Diverging())
    (message,) = [m for m in messages if "training loss" in m]
    assert "Lower the learning rate" in message


def test_dead_tensors_and_rows_are_named() -> None:
    class Lopsided(Regression):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                layer = self.net[0]
                assert isinstance(layer, nn.Linear)
                layer.weight[1:].mul_(1e-9)

    messages = said(ElsaCallback(constraint=Unstructured(0.99, scope="model"), ramp=0.1), Lopsided(), max_steps=20)
    assert any("outputs of net.0.weight" in m for m in messages)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_trouble_is_told_once(accumulate: int) -> None:
    messages = said(
        ElsaCallback(0.9, prox="coupled", penalty=1e-6, ramp=0, frozen=0.1, interval=1),
        accumulate_grad_batches=accumulate,
    )
    assert len({m.split(":")[1][:20] for m in messages}) == len(messages) > 0


def test_a_tensor_that_the_loss_hardly_needs_is_named_with_how_to_keep_more_of_it() -> None:
    class Idle(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(16, 16)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            noise: Tensor = self.idle(torch.ones(16)).square().sum()
            return super().training_step(batch, batch_idx) + 1e-12 * noise

    messages = said(ElsaCallback(0.8), Idle())
    (message,) = [m for m in messages if "hardly anything is left of idle.weight: " in m]
    assert "raise the set's floor" in message
    assert not [m for m in said(ElsaCallback(constraint=Unstructured(0.8, floor=0.1)), Idle()) if "hardly" in m]
