"""Forms in which the weights lie on the set after every step and −u is kept: linearized, the default, and feedback."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.forms.base import Form, Step, Sums, relative_rates
from elsa_lightning.layout.sharded import exact_dtype
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets.base import Constraint, project
from elsa_lightning.tensors import ConstrainedTensor

_STEPS = 4096  # what is derived from sums is rounded, so that it does not depend on the order of summation


class OnSet(Form):
    """Weights that stay on the set: from z the optimizer makes its step d; on the mask z ← z + d, off it u takes d.

    Only the support waits for the next projection. Where the set fixes values, v = z + u is what d is added to on the
    mask too, so that steps below the resolution of the values are remembered. The split is −u.
    """

    on_set = True

    def slowness(self, index: int, penalty: float) -> Any:
        """Return what d is divided by before the dual of the tensor takes it."""
        return penalty

    def after_step(self, step: Step) -> None:
        """u ← u + d/ρ and x ← 0 off the mask."""
        for index, tensor in step.tensors.items():
            seed, slow = step.seed(tensor.p), self.slowness(index, step.penalty)
            for piece in tensor.pieces():
                rows = piece.rows
                x, mask, split = tensor.x(rows), tensor.mask(rows), tensor.split(rows)
                d = x.masked_fill(mask, 0)
                if step.updates:
                    self.watch(index, tensor, d)
                split.sub_(d.to(split.dtype) / slow) if isinstance(slow, Tensor) else split.sub_(d, alpha=1 / slow)
                x.mul_(mask)
                if step.constraint.fixes_values:
                    v = x - split
                    z = project(step.constraint, v, mask, tensor.point(index, piece, v))
                    split = torch.where(mask, z - v, split)
                    x.copy_(z)
                tensor.set_split(rows, split, seed)

    def watch(self, index: int, tensor: ConstrainedTensor, d: Tensor) -> None:
        """Look at a step off the mask, before an update."""

    def former_z(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return the weights."""
        return tensor.x(rows)

    def rescale(self, before: float, after: float) -> float:
        """Remember what the first mask cuts, too: that of one batch's F̂ would stay for ever."""
        return 1.0 if before == 0 else super().rescale(before, after)

    def settle(
        self, tensor: ConstrainedTensor, rows: slice, v: Tensor, mask: Tensor, z: Tensor, factor: Any, seed: int
    ) -> None:
        """Store −u; x ← z."""
        tensor.set_split(rows, (z - v) * factor, seed)
        tensor.x(rows).copy_(z)

    def reopen(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(super().reopen(tensor, rows))

    def dual(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return u."""
        return -tensor.split(rows)


class Feedback(OnSet):
    """``u ← u + d/κ`` off the mask, and nothing is ever forgotten: error feedback (Lin et al., 2020, arXiv:2006.07253).

    Not ADMM: the dual never enters an x-update, so an entry off the mask with a steady gradient grows until it is
    kept, and from the exact optimum the weights walk away. A larger κ makes the memory slower. It does well in short
    runs and gets worse in long ones.
    """

    name = "feedback"
    penalty = 2.0

    def check(self, schedule: Schedule, constraint: Constraint) -> None:
        """Raise ValueError for a penalty that is 0 or begins there."""
        if schedule.penalty == 0 or schedule.shape != "constant":
            raise UserError(
                f"prox 'feedback' divides the optimizer's steps by the penalty, so it must be above 0 and constant; "
                f"got penalty={schedule.penalty}, penalty_schedule={schedule.shape!r}: set penalty_schedule: constant"
            )


class Linearized(OnSet):
    """Linearised ADMM in the optimizer's metric, with weights on the set; the default. Derived in ``docs/method.md``.

        off the mask, every step       u ← u + d/ρ            ρ = 16 σ √n / w, of each tensor
        every update                   u ← θ u                θ ≤ 1 such that ‖u‖ does not grow beyond w/κ

    d is the optimizer's step from z, w the root mean square of what is kept, n the steps of the ADMM phase and σ the
    root mean square of what a step adds to a sum of steps without drift, measured at each update off the mask. So over
    a whole run chance alone brings an entry to a 16th of w, whatever the rate, the batch and the length: what returns
    has a drift that stands out from its noise. θ is the x-update's own pull λ u, with the least λ of each tensor that
    holds the dual: its fixed points are u = −D⁻¹∇f/λ, λ-stationary points. A larger κ holds it to less.
    """

    name = "linearized"
    penalty = 4.0

    _NOISE = 1 / 16

    def __init__(self) -> None:
        self._slow: Tensor = torch.empty(0)  # ρ of each tensor; 1 until a step was seen
        self._memory: Tensor = torch.empty(0)  # root mean square of u after the last update
        self._peaks: list[float] = []
        self._steps: dict[int, Tensor] = {}  # Σ d² of this process, of each tensor
        self._rates: dict[int, float] = {}  # from the root mean square of d to σ

    def slowness(self, index: int, penalty: float) -> Any:
        """Return ρ."""
        return self._slow[index]

    def after_step(self, step: Step) -> None:
        """u ← u + d/ρ and x ← 0 off the mask."""
        if step.updates:
            rates, self._peaks = relative_rates(step.optimizer, self._peaks)
            walks = {p: _walk(group) for group in step.optimizer.param_groups for p in group["params"]}
            self._steps = {}
            self._rates = {i: walks[t.p] / max(1e-3, rates[t.p]) for i, t in step.tensors.items()}
        super().after_step(step)

    def watch(self, index: int, tensor: ConstrainedTensor, d: Tensor) -> None:
        """Measure how large a step is."""
        if tensor.part.counts:
            square = d.to(torch.promote_types(d.dtype, torch.float32)).square().sum()
            self._steps[index] = self._steps.get(index, 0) + square

    def seen(self, count: int, device: torch.device) -> Tensor:
        """Return Σ d² off the mask of the step before an update, ``(tensors,)``, of this process."""
        steps = torch.zeros(count, dtype=exact_dtype(device), device=device)
        for index, square in self._steps.items():
            steps[index] = square
        return steps

    def factors(self, sums: Sums, rescale: float, penalty: float, span: int) -> Tensor:
        """Return θ, and take the new ρ."""
        count = len(sums.z)
        if len(self._slow) != count:
            self._slow, self._memory = torch.ones_like(sums.z), torch.zeros_like(sums.z)
        w = _rms(sums.z, sums.kept)
        before = _rms(sums.memory, sums.entries - sums.former)
        most = torch.maximum(w / penalty, self._memory) if penalty > 0 else torch.full_like(w, torch.inf)
        tiny = torch.finfo(before.dtype).tiny
        theta = (most / before.clamp_min(tiny) * _STEPS).floor() / _STEPS
        theta = torch.where(before > most * (1 + 1e-4), theta, 1.0)
        self._memory = theta * _rms(sums.cut, sums.entries - sums.kept)
        factors = torch.tensor([self._rates.get(i, 0.0) for i in range(count)], device=w.device, dtype=w.dtype)
        sigma = _rms(sums.steps, sums.entries - sums.former) * factors
        slow = sigma * (math.sqrt(span) / self._NOISE) / w
        self._slow = torch.where((sigma > 0) & (w > 0), slow.bfloat16().to(slow.dtype), self._slow)
        self._rates = {}
        return theta

    def inverse_penalty(self, tensor: ConstrainedTensor, penalty: float, off: Tensor, kept: Tensor) -> Any:
        """Return the largest 1/λ whose multiplier D⁻¹∇f/λ is within w/κ; 0 where there is no gradient."""
        return torch.where(off > 0, kept / (penalty * off.clamp_min(torch.finfo(off.dtype).tiny)), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return ρ, what the dual was, and the largest learning rates."""
        return {"slow": self._slow.tolist(), "memory": self._memory.tolist(), "peaks": list(self._peaks)}

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self._slow = torch.tensor(state_dict["slow"], device=device, dtype=exact_dtype(device))
        self._memory = torch.tensor(state_dict["memory"], device=device, dtype=exact_dtype(device))
        self._peaks = list(state_dict["peaks"])


def _walk(group: dict[str, Any]) -> float:
    """Return how much further a sum of steps without drift goes than if they were independent: momentum repeats."""
    beta = float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0) or 0.0)
    return math.sqrt((1 + beta) / max(1e-6, 1 - beta))


def _rms(squares: Tensor, count: Tensor) -> Tensor:
    return (squares / count.clamp_min(1)).sqrt()
