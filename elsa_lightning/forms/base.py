"""What a form of the x-update is: how the optimizer's steps and the constraint come together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.errors import UserError
from elsa_lightning.layout.lowbit import masked
from elsa_lightning.optim.moments import rate_of
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets.base import Constraint
from elsa_lightning.tensors import ConstrainedTensor

Forgets = tuple[Tensor, Tensor]
Importance = Callable[[ConstrainedTensor, slice], Tensor | None]  # F̂ of some rows


@dataclass(frozen=True)
class Step:
    """What a form is told after a step of the optimizer.

    Attributes:
        optimizer: Which stepped.
        tensors: The constrained tensors, by their place among all.
        constraint: The set.
        penalty: λ or κ.
        seed: Makes the seed of the rounding of a parameter's split.
        updates: Whether a z/u-update follows.
    """

    optimizer: Optimizer
    tensors: dict[int, ConstrainedTensor]
    constraint: Constraint
    penalty: float
    seed: Callable[[nn.Parameter], int]
    updates: bool


@dataclass(frozen=True)
class Sums:
    """What an update finds of each tensor, over all processes: each of shape ``(tensors,)``.

    Attributes:
        entries: How many it has.
        kept: How many are kept.
        former: How many were.
        z: Σ z².
        memory: Σ u² over what was not kept, before the update.
        cut: Σ (v − z)², the memory after it.
        steps: Σ d² of the optimizer's step just before it, off the former mask, where :meth:`Form.seen` measured it.
        inner: The same on the mask, where the set fixes values.
    """

    entries: Tensor
    kept: Tensor
    former: Tensor
    z: Tensor
    memory: Tensor
    cut: Tensor
    steps: Tensor
    inner: Tensor


class Form(ABC):
    """One form of the x-update.

    Attributes:
        name: The user's word for it.
        penalty: Its default.
        on_set: Whether the weights lie on the set after every step.
    """

    name: str
    penalty: float
    on_set: bool = False

    def check(self, schedule: Schedule, constraint: Constraint) -> None:
        """Raise ValueError if the form cannot work so."""
        if constraint.fixes_values and not self.on_set:
            raise UserError(
                f"{type(constraint).__name__} fixes the values of kept weights, and prox {self.name!r} keeps one "
                f"number for z and u together, from which these cannot be told apart: use prox 'linearized'"
            )

    def importance(self, moment: Tensor | None, first: bool) -> Tensor | None:
        """Return what a squared change of each weight costs: √F̂, the metric of the optimizer's own steps.

        Args:
            moment: F̂, or None where the optimizer keeps no second moment.
            first: Whether this is for the run's first projection.
        """
        return None if moment is None else moment.sqrt()

    def before_step(self, tensors: Sequence[ConstrainedTensor], penalty: float, scale: Tensor | None) -> None:
        """Add to the final gradients.

        Args:
            tensors: Those with a split.
            penalty: λ or κ.
            scale: Of the gradients, where a fused optimizer under a GradScaler takes it off by itself.
        """
        return

    @abstractmethod
    def after_step(self, step: Step) -> None:
        """Follow the optimizer's step."""

    @abstractmethod
    def former_z(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return z of the last update, as the steps since have left it; what the mask does not keep is no matter."""

    def seen(self, count: int, device: torch.device) -> Tensor:
        """Return what this process saw of the step before an update, ``(tensors, 2)``, as in :class:`Sums`."""
        return torch.zeros(count, 2, device=device)

    def forgets(
        self, optimizer: Optimizer, tensors: Mapping[int, ConstrainedTensor], progress: float
    ) -> dict[int, Forgets]:
        """Return what memory below the resolution of the set's values loses in a step on a fixed mask, by place.

        Nothing for those that forget nothing; else two lengths, both to be divided by the distance of neighbouring
        values: the first gives the share that is lost, the second, where it is below 1, what that is multiplied with.

        Args:
            optimizer: Which stepped.
            tensors: By their place among all.
            progress: How much of the frozen phase is over.
        """
        return {}

    def factors(self, sums: Sums, rescale: float, penalty: float, span: int) -> Tensor:
        """Return what the dual of each tensor is multiplied with at an update, ``(tensors,)``.

        Args:
            sums: What the update found.
            rescale: λ_old/λ_new, since u = y/λ for the true multiplier y.
            penalty: From here on.
            span: Optimizer steps of the ADMM phase.
        """
        return torch.full_like(sums.z, rescale)

    def rescale(self, before: float, after: float) -> float:
        """Return λ_old/λ_new; at the first update there is no dual."""
        return before / after if after > 0 else 0.0

    @abstractmethod
    def settle(
        self, tensor: ConstrainedTensor, rows: slice, v: Tensor, mask: Tensor, z: Tensor, factor: Any, seed: Any
    ) -> None:
        """Store the split, and z in the weights where they lie on the set.

        Args:
            tensor: Whose.
            rows: Which.
            v: x + u.
            mask: What z keeps.
            z: Π_S(v).
            factor: Of the dual, see :meth:`factors`; 1 on the mask where the set fixes values.
            seed: Of the rounding; see :meth:`ConstrainedTensor.seed`.
        """

    def reopen(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return the split of weights on the set without a dual."""
        x = tensor.x(rows)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def dual(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return u."""
        return -masked(tensor.split(rows), ~tensor.mask(rows))

    def dual_sum(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return v = x + u, in at least float32."""
        x = tensor.x(rows)
        return x.to(torch.promote_types(x.dtype, torch.float32)) + self.dual(tensor, rows)

    def inverse_penalty(self, tensor: ConstrainedTensor, penalty: float, off: Tensor, kept: Tensor) -> Any:
        """Return 1/λ of a tensor, in the metric of :meth:`direction`, for the stationarity of a run.

        Args:
            tensor: Which.
            penalty: λ or κ.
            off: Root mean square of :meth:`direction` over what is not kept.
            kept: Root mean square of what is kept.
        """
        return peak_rate(tensor) / penalty

    def direction(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return D⁻¹ ∇f of the latest batch, in float32, with D the root of the second moment where there is one."""
        grad, moment = tensor.grad(rows).float(), tensor.importance(rows)
        if moment is None:
            return grad
        betas = _group(tensor).get("betas")
        correction = 1.0 if betas is None else 1 - betas[1] ** max(1.0, float(tensor.state.get("step", 1)))
        return grad / ((moment.float() / correction).sqrt() + 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, as plain numbers."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device) -> None:
        """Restore it."""
        return


def relative_rates(optimizer: Optimizer, peaks: Sequence[float]) -> tuple[dict[nn.Parameter, float], list[float]]:
    """Return each parameter's learning rate over its largest, and the largest of each group.

    Args:
        optimizer: Asked at every step, because loading an optimizer's state replaces its groups.
        peaks: The largest of each group so far.
    """
    groups = optimizer.param_groups
    rates = [rate_of(group) for group in groups]
    known = [_known_peak(group) for group in groups]
    former = [*peaks, *[0.0] * (len(groups) - len(peaks))]
    now = [max(found) for found in zip(rates, known, former, strict=True)]
    relative = [rate / peak if peak else 0.0 for rate, peak in zip(rates, now, strict=True)]
    return {p: rate for group, rate in zip(groups, relative, strict=True) for p in group["params"]}, now


def peak_rate(tensor: ConstrainedTensor) -> float:
    """Return the largest learning rate of a tensor, as far as its group says."""
    group = _group(tensor)
    return max(rate_of(group), _known_peak(group))


def _group(tensor: ConstrainedTensor) -> dict[str, Any]:
    return next(g for g in tensor.optimizer.param_groups if any(p is tensor.p for p in g["params"]))


def _known_peak(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group.get("initial_lr")) or 0.0)
