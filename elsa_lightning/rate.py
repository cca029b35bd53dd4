"""The learning rate that a cut asks for, from the weights alone.

An Adam moves every weight by about its learning rate a step, in directions that inputs have in common. So a step at
rate η changes what a layer of n inputs and weights of size σ gives by a share η √n / σ of it, and what L blocks give,
each added to the others, by a share √L times that. The right share grows with what is cut, for runs that cut more have
more to make good; over models and sparsities the best rates lie close to

    rate = σ E √(2 / (n L)),

with E = ‖x − Π_S(x)‖² / ‖x‖² the share of the weights' squares that the cut takes. ``docs/runs.md`` has what was
measured.
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
_NEAR = 4.0  # times too large or too small from which a run is told


@dataclass(frozen=True)
class Damage:
    """What bringing weights into a set at once would take from them.

    Attributes:
        rms: Root mean square of the constrained weights.
        share: ‖x − Π_S(x)‖² / ‖x‖².
        inputs: Of a layer, the mean over the weights.
        depth: Blocks of layers; see :func:`blocks`.
    """

    rms: float
    share: float
    inputs: float
    depth: int

    @property
    def rate(self) -> float:
        """Peak learning rate of an Adam for a run that makes good for it."""
        return _SHARE * self.rms * self.share / math.sqrt(self.inputs * self.depth)

    def __str__(self) -> str:
        return (
            f"the cut takes {self.share:.1%} of the squares of weights of size {self.rms:.2g}, "
            f"in {self.depth} blocks of layers of {self.inputs:.0f} inputs"
        )


def blocks(names: Iterable[str]) -> int:
    """Return how many blocks follow each other: what parameters' names are up to their first number, each once."""
    return len({re.sub(r"(\b\d+\b).*", r"\1", name) for name in names})


def is_adam(optimizer: Optimizer) -> bool:
    """Say whether a step is about as long as the learning rate, whatever the gradients: an Adam of any make."""
    return "adam" in type(optimizer).__name__.lower()


def peak(optimizer: Optimizer) -> float:
    """Return the learning rate that schedules start from, the largest of the groups'."""
    return max(float(group.get("initial_lr", group.get("lr")) or 0.0) for group in optimizer.param_groups)


def choose(optimizer: Optimizer, schedulers: list[Any], damage: Damage) -> float:
    """Scale the rates of all groups, and of the schedulers over them, so that the largest is the one asked for.

    Returns:
        The rate.

    Raises:
        UserError: The optimizer is no Adam, or there is no rate to scale.
    """
    if not is_adam(optimizer):
        raise UserError(
            f"learning_rate 'auto' knows how far an Adam steps, and the optimizer is {type(optimizer).__name__}: leave "
            f"learning_rate out and give the optimizer its own rate"
        )
    if damage.rate == 0 or peak(optimizer) == 0:
        return peak(optimizer)
    factor = damage.rate / peak(optimizer)
    for group in optimizer.param_groups:
        for key in ("lr", "initial_lr", "max_lr", "min_lr"):  # OneCycleLR and others keep theirs in the group
            if key in group:
                group[key] = group[key] * factor  # of a tensor too, whose copy capturable kernels read
    for scheduler in schedulers:
        _scale(scheduler, optimizer, factor)
    return damage.rate


def _scale(scheduler: Any, optimizer: Optimizer, factor: float) -> None:
    """Scale all rates that a schedule over an optimizer keeps, and those of the schedules that it is made of."""
    for part in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        _scale(part, optimizer, factor)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for name in ("base_lrs", "max_lrs", "min_lrs"):  # of CyclicLR, of ReduceLROnPlateau
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    if hasattr(scheduler, "eta_min"):
        scheduler.eta_min *= factor
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def doubt(optimizer: Optimizer, damage: Damage) -> str | None:
    """Return what to tell of a rate that is far from the one that the cut asks for."""
    if not is_adam(optimizer) or damage.rate == 0 or peak(optimizer) == 0:
        return None
    ratio = peak(optimizer) / damage.rate
    if 1 / _NEAR <= ratio <= _NEAR:
        return None
    how = f"{1 / ratio:.0f} times smaller" if ratio < 1 else f"{ratio:.0f} times larger"
    return (
        f"Elsa: the learning rate {peak(optimizer):.2g} is {how} than what this cut usually asks for, "
        f"{damage.rate:.2g} ({damage}); ElsaCallback(learning_rate='auto') takes that"
    )
