"""The interface of a form: how the x-update combines the optimizer's steps with the constraint."""

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
    """The arguments of :meth:`Form.after_step`.

    Attributes:
        optimizer: The optimizer that made the step.
        tensors: The constrained tensors with a split, by their index among all.
        constraint: The set.
        penalty: λ or κ.
        seed: Returns the seed for rounding a parameter's split.
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
    """What an update measures of each tensor, over all processes; every attribute has shape ``(tensors,)``.

    Attributes:
        entries: Number of entries.
        kept: Entries on the new mask.
        former: Entries on the former mask.
        z: Σ z².
        memory: Σ u² off the former mask, before the update.
        cut: Σ (v − z)², the same off the new mask, after it.
        steps: Σ d² of the latest optimizer step off the former mask, where :meth:`Form.seen` measured it.
        inner: Σ d² of that step on the former mask, where the set fixes values.
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
        name: The name by which users select it.
        penalty: The default penalty.
        on_set: Whether the weights lie on the set after every step.
        prior: n₀ of :mod:`elsa_lightning.fisher`: how many batches the product of F̂'s means counts for.
    """

    name: str
    penalty: float
    on_set: bool = False
    prior: float = 0.0

    def check(self, schedule: Schedule, constraint: Constraint) -> None:
        """Raise ValueError if the form cannot work with this schedule or set."""
        if constraint.fixes_values and not self.on_set:
            raise UserError(
                f"{type(constraint).__name__} fixes the values of kept weights, and prox {self.name!r} keeps one "
                f"number for z and u together, from which these cannot be told apart: use prox 'linearized'"
            )

    def importance(self, moment: Tensor | None, first: bool) -> Tensor | None:
        """Return the cost of a squared change of each weight: √F̂, the metric of the optimizer's own steps.

        Args:
            moment: F̂, or None where the optimizer keeps no second moment.
            first: Whether this is for the run's first projection.
        """
        return None if moment is None else moment.sqrt()

    def before_step(self, tensors: Sequence[ConstrainedTensor], penalty: float, scale: Tensor | None) -> None:
        """Add the form's own term to the final gradients.

        Args:
            tensors: The tensors with a split.
            penalty: λ or κ.
            scale: The gradients' scale, where a fused optimizer under a GradScaler unscales them itself.
        """
        return

    @abstractmethod
    def after_step(self, step: Step) -> None:
        """Complete the x-update after the optimizer's step."""

    @abstractmethod
    def former_z(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return z of the last update, as the steps since have changed it; entries off the mask are not used."""

    def seen(self, count: int, device: torch.device) -> Tensor:
        """Return this process's ``steps`` and ``inner`` of :class:`Sums`, ``(tensors, 2)``."""
        return torch.zeros(count, 2, device=device)

    def forgets(
        self, optimizer: Optimizer, tensors: Mapping[int, ConstrainedTensor], progress: float
    ) -> dict[int, Forgets]:
        """Return how much of the dual on the mask each tensor forgets in a step on a fixed mask, by tensor index.

        That dual exists where the set fixes values, and holds the rounding errors. Tensors that forget nothing are left
        out. The others have two lengths, both to be divided by the distance of neighbouring values: the first gives the
        share that is lost, the second a factor of this share while it is below 1.

        Args:
            optimizer: The optimizer that made the step.
            tensors: The tensors by their index among all.
            progress: The fraction of the frozen phase that is over.
        """
        return {}

    def factors(self, sums: Sums, rescale: float, penalty: float, span: int) -> Tensor:
        """Return the factor of each tensor's dual at an update, ``(tensors,)``.

        Args:
            sums: The measurements of the update.
            rescale: λ_old/λ_new, since u = y/λ for the true multiplier y.
            penalty: The penalty from now on.
            span: Optimizer steps of the ADMM phase.
        """
        return torch.full_like(sums.z, rescale)

    def rescale(self, before: float, after: float) -> float:
        """Return λ_old/λ_new; 0 at the first update, because there is no dual before it."""
        return before / after if after > 0 else 0.0

    @abstractmethod
    def settle(
        self, tensor: ConstrainedTensor, rows: slice, v: Tensor, mask: Tensor, z: Tensor, factor: Any, seed: Any
    ) -> None:
        """Store the split after an update; forms on the set also store z in the weights.

        Args:
            tensor: The tensor.
            rows: The rows to store.
            v: x + u.
            mask: True where z keeps an entry.
            z: Π_S(v).
            factor: Factor of the dual, see :meth:`factors`; 1 on the mask where the set fixes values.
            seed: Seed for rounding the split; see :meth:`ConstrainedTensor.seed`.
        """

    def reopen(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return the split of weights that lie on the set, for a dual of 0."""
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
        """Return 1/λ of a tensor, in the metric of :meth:`direction`, for measuring stationarity.

        Args:
            tensor: The tensor.
            penalty: λ or κ.
            off: Root mean square of :meth:`direction` off the mask.
            kept: Root mean square of the kept weights.
        """
        return peak_rate(tensor) / penalty

    def direction(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return D⁻¹ ∇f of the latest batch, in float32; D is the root of the second moment, 1 without one."""
        grad, moment = gradient(tensor, rows), tensor.importance(rows)
        if moment is None:
            return grad
        betas = _group(tensor).get("betas")
        correction = 1.0 if betas is None else 1 - betas[1] ** max(1.0, float(tensor.state.get("step", 1)))
        return grad / ((moment.float() / correction).sqrt() + 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, as plain numbers."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned."""
        return


def relative_rates(optimizer: Optimizer, peaks: Sequence[float]) -> tuple[dict[nn.Parameter, float], list[float]]:
    """Return each parameter's learning rate divided by its largest one, and the largest rate of each group.

    Args:
        optimizer: The optimizer; its groups are read at every step, because loading its state replaces them.
        peaks: The largest rate of each group so far.
    """
    groups = optimizer.param_groups
    rates = [rate_of(group) for group in groups]
    known = [_known_peak(group) for group in groups]
    former = [*peaks, *[0.0] * (len(groups) - len(peaks))]
    now = [max(found) for found in zip(rates, known, former, strict=True)]
    relative = [rate / peak if peak else 0.0 for rate, peak in zip(rates, now, strict=True)]
    return {p: rate for group, rate in zip(groups, relative, strict=True) for p in group["params"]}, now


def gradient(tensor: ConstrainedTensor, rows: slice) -> Tensor:
    """Return ∇f of the latest batch, in float32. f is what falls, so ``maximize`` turns the sign."""
    grad = tensor.grad(rows).float()
    return -grad if _group(tensor).get("maximize") else grad


def peak_rate(tensor: ConstrainedTensor) -> float:
    """Return the largest learning rate of a tensor that is known from its parameter group."""
    group = _group(tensor)
    return max(rate_of(group), _known_peak(group))


def _group(tensor: ConstrainedTensor) -> dict[str, Any]:
    return next(g for g in tensor.optimizer.param_groups if any(p is tensor.p for p in g["params"]))


def _known_peak(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group.get("initial_lr")) or 0.0)
