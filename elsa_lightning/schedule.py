"""The schedule of a run: penalty, sparsity ramp, projections and frozen phase, by optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from elsa_lightning.errors import UserError

PenaltySchedule = Literal["constant", "linear", "cosine", "exponential"]

_EXPONENTIAL_START = 1e-3  # fraction of the penalty at which an exponential schedule starts


@dataclass(frozen=True)
class Schedule:
    """The course of an ADMM run, independent of its length.

    A run of ``total`` optimizer steps has an ADMM phase, in which the mask is refreshed at every projection
    and the penalty pulls the weights towards the set, and a frozen phase, in which the mask is fixed, the
    zeros are exact and the kept weights train on the loss alone.

    Args:
        penalty: How strongly the weights, or the dual of pruned weights, are bound to the set at the end of the ADMM
            phase; λ for ``coupled`` and ``published``, κ, without a unit, for the other forms. None takes the form's
            default: 4 for ``linearized``, 0.01 for ``coupled``, 2 for ``decoupled`` and ``feedback``.
        shape: How the penalty reaches that value: constant, or from 0 linearly or as half a cosine, or exponentially
            from a thousandth.
        interval: Optimizer steps between projections (K). None takes a 256th of the ADMM phase, at most 32.
        ramp: Fraction of all steps over which the sparsity rises to its target, as 1 − (1 − t)³ from the sparsity at
            which the set begins (70 %, or the target if that is less); 0 asks for the target from the first projection.
        frozen: Fraction of all steps, the last ones, that form the frozen phase; 0 for none.

    Raises:
        ValueError: A value is out of range.
    """

    penalty: float | None = None
    shape: PenaltySchedule = "constant"
    interval: int | None = None
    ramp: float = 0.4
    frozen: float = 0.4

    def __post_init__(self) -> None:
        if self.penalty is not None and not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise UserError(f"penalty must be a finite number of 0 or more, got {self.penalty}")
        if self.shape not in get_args(PenaltySchedule):
            raise UserError(f"penalty_schedule must be one of {get_args(PenaltySchedule)}, got {self.shape!r}")
        if self.interval is not None and self.interval < 1:
            raise UserError(f"interval must be 1 or more optimizer steps, or None, got {self.interval}")
        if not (0 <= self.ramp <= 1 and 0 <= self.frozen < 1 and self.ramp + self.frozen <= 1):
            raise UserError(
                f"ramp and frozen are fractions of all steps with ramp + frozen at most 1, frozen below 1; "
                f"got ramp={self.ramp}, frozen={self.frozen}: the mask must reach its sparsity before it is frozen"
            )

    def freeze_step(self, total: int) -> int:
        """Return the optimizer step after which the mask is fixed; ``total`` when there is no frozen phase."""
        return max(1, total - int(self.frozen * total))

    def projects_at(self, step: int, total: int) -> bool:
        """Return whether the mask is refreshed after optimizer step ``step``, counted from 1."""
        freeze = self.freeze_step(total)
        return step == 1 or step == freeze or (step < freeze and step % self._every(total) == 0)

    def refits_at(self, step: int, total: int) -> bool:
        """Return whether numbers that groups of entries share are chosen anew after a step on a fixed mask."""
        return self.freeze_step(total) < step < total and step % self._every(total) == 0

    def _every(self, total: int) -> int:
        return self.interval or min(32, max(1, self.freeze_step(total) // 256))

    def penalty_at(self, step: int, total: int) -> float:
        """Return the penalty that holds after optimizer step ``step``."""
        if self.penalty is None:
            raise UserError("the penalty is the form's own: ask the schedule that ADMM has")
        t = min(1.0, step / self.freeze_step(total))
        if self.shape == "linear":
            return self.penalty * t
        if self.shape == "cosine":
            return self.penalty * (1 - math.cos(math.pi * t)) / 2
        if self.shape == "exponential":
            return self.penalty * math.pow(_EXPONENTIAL_START, 1 - t)
        return self.penalty

    def tightness_at(self, step: int, total: int) -> float:
        """Return how far the constraint has closed after ``step``: 0 not at all, 1 fully."""
        end = min(round(self.ramp * total), self.freeze_step(total))
        return 1.0 if step >= end else 1 - (1 - step / end) ** 3
