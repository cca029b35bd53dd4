"""Warns during a run of signs that it goes wrong: a rising loss, a mask that does not settle, dead tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from elsa_lightning.admm import ADMM
from elsa_lightning.optim.rounding import hazard
from elsa_lightning.report import some
from elsa_lightning.sets.structured import is_structured

_LATE = 0.75  # fraction of the ADMM phase after which residuals and flips should be small
_RESIDUAL = 0.2  # largest ‖x − z‖/‖x‖ after that
_FLIPS = 0.1  # largest share of the kept entries that one update exchanges after that
_RISE = 1.5  # factor of the loss over its lowest value since the full sparsity was reached
_BATCHES = 16  # least number of batches over which the loss is averaged
_DEAD = 0.1  # a tensor is dead if its share is below this fraction of the whole model's
_EMPTY_ROWS = 0.5


class Health:
    """Warns of each kind of trouble once, and names the setting that most likely helps."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._loss: Tensor | None = None
        self._batches = 0
        self._lowest = float("inf")

    def add_loss(self, outputs: Any) -> None:
        """Add the loss of a batch, as a training step returned it, without synchronizing with the device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = loss.detach().float()
            self._loss = loss if self._loss is None else self._loss + loss
            self._batches += 1

    def warnings(self, admm: ADMM, residual: float, flips: float, sparsity: float) -> Iterator[str]:
        """Yield warnings about the latest update, each kind only once in a run."""
        freeze, kept = admm.schedule.freeze_step(admm.total_steps), max(1 - sparsity, 1e-9)
        if admm.schedule.tightness_at(admm.step, admm.total_steps) < 1:
            return
        found = list(self._rising())
        if admm.step >= _LATE * freeze:
            found += [*self._moving(admm, freeze, residual, min(1.0, flips / kept)), *self._dead(admm, kept)]
        for kind, message in found:
            if kind not in self._said:
                self._said.add(kind)
                yield f"Elsa, step {admm.step} of {admm.total_steps}: {message}"

    def _rising(self) -> Iterator[tuple[str, str]]:
        if self._loss is None or self._batches < _BATCHES:
            return
        loss = float(self._loss) / self._batches
        self._loss, self._batches = None, 0
        lowest, self._lowest = self._lowest, min(self._lowest, loss)
        if 0 < lowest < loss / _RISE:
            message = (
                f"the training loss is {loss:.3g} and was {lowest:.3g} since the full sparsity was reached: it "
                f"diverges. Lower the learning rate, or clip gradients (gradient_clip_val)"
            )
            yield "loss", message

    def _moving(self, admm: ADMM, freeze: int, residual: float, flips: float) -> Iterator[tuple[str, str]]:
        penalty = f"penalty (now {admm.schedule.penalty:g})"
        if residual > _RESIDUAL:
            message = (
                f"the weights are still {residual:.0%} of their norm away from the constraint, and the projection "
                f"after step {freeze} will cut that off at once. Raise {penalty} or reach the full sparsity earlier "
                f"(a smaller ramp, now {admm.schedule.ramp:g})"
            )
            yield "residual", message
        if flips > _FLIPS:
            message = (
                f"the mask still moves: {flips:.0%} of what is kept was exchanged in the last update, and the mask is "
                f"fixed after step {freeze}. Train longer, or raise {penalty}"
            )
            yield "flips", message

    def _dead(self, admm: ADMM, kept: float) -> Iterator[tuple[str, str]]:
        if is_structured(admm.constraint):
            return  # whole units are meant to be zero
        tensors, counts = admm.occupancy()
        shares, rows = (counts[:, 0] / counts[:, 1]).tolist(), (counts[:, 2] / counts[:, 3].clamp_min(1)).tolist()
        if names := [name for name, share in zip(tensors, shares, strict=True) if share < _DEAD * kept]:
            message = (
                f"hardly anything is left of {some(names)}: the loss asks least of these. To keep more, raise the "
                f"set's floor, give every tensor the same sparsity (scope 'tensor'), or leave these dense (ignore)"
            )
            yield "dead", message
        if names := [name for name, share in zip(tensors, rows, strict=True) if share > _EMPTY_ROWS]:
            message = (
                f"more than half of the outputs of {some(names)} are always zero. Lower the sparsity, or leave these "
                f"dense (ignore)"
            )
            yield "rows", message


def diverged(admm: ADMM, clip: str) -> str:
    """Return the error message for a run whose weights are no longer finite.

    Args:
        admm: The run's ADMM.
        clip: Advice how to clip gradients, in words.
    """
    step = 0 if admm.last_update is None else admm.last_update.step
    cause = hazard(admm.optimizer) or (
        f"the loss diverged. Lower the learning rate, {clip} or lower penalty={admm.schedule.penalty:g}"
    )
    return f"after {step} optimizer steps the constrained weights are no longer finite: {cause}"
