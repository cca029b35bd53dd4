"""Chooses a peak learning rate from the weights and how much of them the set cuts.

An Adam moves every weight by about its learning rate in each step, in directions that inputs have in common. So a step
at rate η changes the output of a layer with n inputs and weights of size σ by a share η √n / σ, and the summed output
of L blocks by a share √L times that. The right share grows with the cut, because runs that cut more have more to make
up for. Over models and sparsities the best rates lie close to

    rate = σ E √(2 / (n L)),

with E = ‖x − Π_S(x)‖² / ‖x‖², the share of the weights' squares that the cut removes. ``docs/runs.md`` has the
measurements.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from elsa_lightning.errors import UserError

_SHARE = math.sqrt(2)
_NEAR = 4.0  # factor by which a rate may be too large or too small without a warning


@dataclass(frozen=True)
class Damage:
    """How much of the weights a projection to the set would remove at once.

    Attributes:
        rms: Root mean square of the constrained weights.
        share: ‖x − Π_S(x)‖² / ‖x‖².
        inputs: Number of inputs of a layer, averaged over the weights.
        depth: Number of blocks; see :func:`blocks`.
    """

    rms: float
    share: float
    inputs: float
    depth: int

    @property
    def rate(self) -> float:
        """Peak learning rate with which a run with Adam makes up for the cut."""
        return _SHARE * self.rms * self.share / math.sqrt(self.inputs * self.depth)

    def __str__(self) -> str:
        return (
            f"the cut takes {self.share:.1%} of the squares of weights of size {self.rms:.2g}, "
            f"in {self.depth} blocks of layers of {self.inputs:.0f} inputs"
        )


def blocks(names: Iterable[str]) -> int:
    """Return the number of blocks: of distinct prefixes of parameter names up to their first number."""
    return len({re.sub(r"(\b\d+\b).*", r"\1", name) for name in names})


def is_adam(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is some Adam: its steps are about as long as the learning rate, at any gradient."""
    return "adam" in type(optimizer).__name__.lower()


def peak(optimizer: Optimizer, schedulers: Iterable[Any] = ()) -> float:
    """Return the largest learning rate of all groups: the one that schedules start from, or a higher one they reach.

    Args:
        optimizer: The optimizer.
        schedulers: Its schedulers; CyclicLR alone knows how high it goes, OneCycleLR leaves that in the groups.
    """
    rates = [group.get("max_lr") or group.get("initial_lr", group.get("lr")) for group in optimizer.param_groups]
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", None) is optimizer:
            rates += getattr(scheduler, "max_lrs", [])
        rates.append(peak(optimizer, getattr(scheduler, "_schedulers", ())))
    return max(float(rate or 0.0) for rate in rates)


def choose(optimizer: Optimizer, schedulers: list[Any], damage: Damage) -> float:
    """Scale the rates of all groups, and of their schedulers, so that the largest one is the damage's ``rate``.

    Returns:
        The rate.

    Raises:
        UserError: The optimizer is not an Adam, or there is no rate to scale.
    """
    if not is_adam(optimizer):
        raise UserError(
            f"learning_rate 'auto' knows how far an Adam steps, and the optimizer is {type(optimizer).__name__}: leave "
            f"learning_rate out and give the optimizer its own rate"
        )
    top = peak(optimizer, schedulers)
    if damage.rate == 0 or top == 0:
        return top
    factor = damage.rate / top
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):  # OneCycleLR and others store rates in the group
            if key in group:
                group[key] = group[key] * factor  # may be a tensor, for capturable kernels
    for scheduler in schedulers:
        _scale(scheduler, optimizer, factor)
    return damage.rate


def _scale(scheduler: Any, optimizer: Optimizer, factor: float) -> None:
    """Scale all rates that a scheduler of an optimizer stores, and those of schedulers inside it."""
    for part in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        _scale(part, optimizer, factor)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for name in ("base_lrs", "max_lrs", "min_lrs"):  # also CyclicLR, ReduceLROnPlateau
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    if hasattr(scheduler, "eta_min"):
        scheduler.eta_min *= factor
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def doubt(optimizer: Optimizer, damage: Damage, schedulers: Iterable[Any] = ()) -> str | None:
    """Return a warning if the largest learning rate is far from the one that suits the cut, else None."""
    top = peak(optimizer, schedulers)
    if not is_adam(optimizer) or damage.rate == 0 or top == 0:
        return None
    ratio = top / damage.rate
    if 1 / _NEAR <= ratio <= _NEAR:
        return None
    how = f"{1 / ratio:.0f} times smaller" if ratio < 1 else f"{ratio:.0f} times larger"
    return (
        f"Elsa: the learning rate {top:.2g} is {how} than what this cut usually asks for, "
        f"{damage.rate:.2g} ({damage}); ElsaCallback(learning_rate='auto') takes that"
    )
