"""Forms whose weights lie on the set after every step, and that store −u: linearized (the default) and feedback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from elsa_lightning.errors import UserError
from elsa_lightning.forms.base import Forgets, Form, Importance, Step, Sums, relative_rates
from elsa_lightning.layout.fused import step_off_mask, usable
from elsa_lightning.layout.lowbit import chosen, masked
from elsa_lightning.layout.rows import Piece
from elsa_lightning.layout.sharded import exact_dtype, sent
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets.base import Constraint, project
from elsa_lightning.stacks import by_rows, together
from elsa_lightning.tensors import SCALE, SPLIT, ConstrainedTensor

_STEPS = 4096  # θ is rounded to multiples of 1/_STEPS, so that it does not depend on the order of summation


class OnSet(Form):
    """Base of forms whose weights stay on the set: the optimizer's step d is added to z on the mask, to u off it.

    Only the support stays fixed until the next projection. Where the set fixes values, d is added to v = z + u on the
    mask too, so that steps below the resolution of the values are remembered. The split is −u.
    """

    on_set = True
    prior = 8.0

    def slowness(self, places: Sequence[int], penalty: float) -> Any:
        """Return the divisor of d before it is added to the duals: one number, or one a tensor, ``(tensors,)``."""
        return penalty

    def after_step(self, step: Step) -> None:
        """u ← u + d/ρ and x ← 0 off the mask."""
        fixes_values = step.constraint.fixes_values
        others = step.tensors if step.updates or fixes_values else self._in_one_pass(step)
        for places, tensor in together(others.items(), stacks=not fixes_values):
            seed, slow = tensor.seed(step.seed), self.slowness(places, step.penalty)
            for piece in tensor.pieces():
                rows = piece.rows
                inner = self._inner_step(step, places[0], tensor, piece) if step.updates else None
                d, split = tensor.take_off(rows), tensor.split(rows)
                if step.updates:
                    self.watch(places, tensor, d)
                if inner is not None:
                    self.watch(places, tensor, inner, inner=True)
                d = d.to(split.dtype)
                if isinstance(slow, Tensor):
                    split.addcdiv_(d, by_rows(slow.to(split.dtype), len(split)), value=-1)
                else:
                    split.sub_(d, alpha=1 / slow)
                if fixes_values:
                    split = on_values(step.constraint, places[0], tensor, piece, split)
                tensor.set_split(rows, split, seed)
            tensor.write(SPLIT, SCALE)

    def _in_one_pass(self, step: Step) -> dict[int, ConstrainedTensor]:
        """Do the step of tensors that a fused kernel can handle, all rows at once; return the other tensors."""
        lines, others = [], {}
        for place, tensor in step.tensors.items():
            line = None
            if usable(tensor.layout.device) and isinstance(slow := self.slowness((place,), step.penalty), Tensor):
                line = tensor.line(tensor.p.detach(), slow, tensor.seed(step.seed))
            if line is None:
                others[place] = tensor
            else:
                lines.append(line)
        step_off_mask(lines)
        return others

    def _inner_step(self, step: Step, index: int, tensor: ConstrainedTensor, piece: Piece) -> Tensor | None:
        """Return the step on the mask where the set fixes values: before it, the weights lay exactly on these."""
        if not step.constraint.fixes_values:
            return None
        x, mask = tensor.x(piece.rows), tensor.mask(piece.rows)
        moved = masked(x, mask)
        return moved - project(step.constraint, moved, mask, tensor.point(index, piece, moved))

    def watch(self, places: Sequence[int], tensor: ConstrainedTensor, d: Tensor, inner: bool = False) -> None:
        """Measure the last step before an update, of some tensors off the mask or, with ``inner``, on it."""

    def former_z(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return the weights, which are z."""
        return tensor.x(rows)

    def rescale(self, before: float, after: float) -> float:
        """Return λ_old/λ_new, but 1 at the first update: else nothing cut by one batch's F̂ could return."""
        return 1.0 if before == 0 else super().rescale(before, after)

    def settle(
        self, tensor: ConstrainedTensor, rows: slice, v: Tensor, mask: Tensor, z: Tensor, factor: Any, seed: Any
    ) -> None:
        """Store −u, and z in the weights; on the mask the split is the rounding error, which has factor 1."""
        tensor.set_split(rows, (z - v).mul_(factor), seed)
        tensor.x(rows).copy_(z)

    def reopen(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return zeros: −u of a dual of 0."""
        return torch.zeros_like(super().reopen(tensor, rows))

    def dual(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return u."""
        return -tensor.split(rows)

    def dual_sum(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """Return v = x + u, in at least float32."""
        return tensor.x(rows) - tensor.split(rows)


def on_values(
    constraint: Constraint, place: int, tensor: ConstrainedTensor, piece: Piece, split: Tensor,
    forgets: Forgets | None = None, importance: Importance | None = None,
) -> Tensor:  # fmt: skip
    """Round kept weights to the set's values after a step; return the split, which remembers the rounding error.

    Args:
        constraint: The set.
        place: Index of the tensor among all.
        tensor: The tensor.
        piece: The rows.
        split: Their split, with the rounding errors so far.
        forgets: How much of these is forgotten first; see :meth:`Form.forgets`.
        importance: Returns F̂ of some rows, if the numbers that groups of entries share are to be chosen anew.
    """
    x, mask = tensor.x(piece.rows), tensor.mask(piece.rows)
    point = tensor.point(place, piece, x)
    apart = constraint.resolution(point)
    if forgets is not None and apart is not None:
        share, path = (length.to(split.dtype) / apart for length in forgets)
        split = split * (1 - share * path.clamp_max(1)).clamp_min(0)
    v = x - split
    if importance is not None and point.numbers is not None:
        kept = v.masked_fill(~mask, 0)
        point.numbers.copy_(constraint.fit(kept, replace(point, v=v, importance=importance(tensor, piece.rows))))
    z = project(constraint, v, mask, point)
    x.copy_(z)
    lost = z - v
    if apart is not None:  # beyond the last value u would grow for ever, and stretch the scale that is chosen next
        most = torch.maximum(split.abs(), apart)
        lost = torch.minimum(torch.maximum(lost, -most), most)
    return chosen(mask, lost, split.to(lost.dtype))


class Feedback(OnSet):
    """``u ← u + d/κ`` off the mask, and nothing is ever forgotten: error feedback (Lin et al., 2020, arXiv:2006.07253).

    This is not ADMM: the dual never enters an x-update, so v of a pruned entry with a steady gradient grows until it is
    kept, and even from the exact optimum the weights walk away. A larger κ makes u grow more slowly. ``feedback`` does
    well in short runs and gets worse in long ones.
    """

    name = "feedback"
    penalty = 2.0

    def check(self, schedule: Schedule, constraint: Constraint) -> None:
        """Raise ValueError unless the penalty is constant and above 0."""
        if schedule.penalty == 0 or schedule.shape != "constant":
            raise UserError(
                f"prox 'feedback' divides the optimizer's steps by the penalty, so it must be above 0 and constant; "
                f"got penalty={schedule.penalty}, penalty_schedule={schedule.shape!r}: set penalty_schedule: constant"
            )


class Linearized(OnSet):
    """Linearised ADMM in the optimizer's metric, with weights on the set: the default, derived in ``docs/method.md``.

        off the mask, every step       u ← u + d/ρ            ρ = 16 σ √n / w, of each tensor
        every update                   u ← θ u                θ ≤ 1 such that ‖u‖ does not grow beyond w/κ

    d is the optimizer's step from z, w the root mean square of the kept weights, n the steps of the ADMM phase, at
    least 1000. σ is the root mean square of what one step adds to a sum of steps without drift, measured off the mask
    at each update. So noise alone brings an entry over a whole run to w/16, in a short run to less, whatever learning
    rate and batch size are: an entry returns only if its drift stands out from its noise. θ is the x-update's own pull
    λ u, with the least λ of each tensor that bounds the dual: its fixed points are u = −D⁻¹∇f/λ, λ-stationary points.
    A larger κ bounds the dual to less.

    Where the set fixes values at a distance s, rounding errors are kept in u on the mask. While the mask moves nothing
    of them is forgotten, so weights whose optimum is between two values change between these. In the frozen phase
    λ grows:

        on a fixed mask, every step    u ← (1 − c ‖d‖/s) u    c from 0 to 8, ‖d‖ the root mean square of a step

    While L, the sum of ‖d‖ since the mask was fixed, is below s, c is multiplied by L/s. A weight with drift d changes
    its value as long as |d| > c/2 ‖d‖, so the clearest cases come to rest first and the others make up for them, until
    all weights rest.
    """

    name = "linearized"
    penalty = 4.0

    _NOISE = 1 / 16
    _LEAST_STEPS = 1000  # shorter runs count as this long: few steps say little beside a weight from a long training
    _SETTLED = 8.0

    def __init__(self) -> None:
        self._slow: Tensor = torch.empty(0)  # ρ of each tensor; 1 until a step was measured
        self._memory: Tensor = torch.empty(0)  # root mean square of u after the last update
        self._peaks: list[float] = []
        self._steps: dict[tuple[int, ...], Tensor] = {}  # Σ d² off the mask on this process, by tensor indices
        self._rates: dict[int, float] = {}  # factors from the root mean square of d to σ
        self._inner: dict[tuple[int, ...], Tensor] = {}  # Σ d² on the mask, likewise
        self._relative: dict[int, float] = {}  # learning rates divided by the largest
        self._pace: Tensor = torch.empty(0)  # root mean square of d on the mask, at the largest learning rate
        self._paths: dict[int, float] = {}  # Σ of relative learning rates since the mask was fixed

    def slowness(self, places: Sequence[int], penalty: float) -> Any:
        """Return ρ."""
        first, last = places[0], places[-1] + 1
        in_a_row = last - first == len(places)
        return self._slow[first:last] if in_a_row else torch.stack([self._slow[place] for place in places])

    def after_step(self, step: Step) -> None:
        """u ← u + d/ρ and x ← 0 off the mask."""
        if step.updates:
            rates, self._peaks = relative_rates(step.optimizer, self._peaks)
            walks = {p: _walk(group) for group in step.optimizer.param_groups for p in group["params"]}
            self._steps, self._inner = {}, {}
            self._relative = {i: max(1e-3, rates[t.p]) for i, t in step.tensors.items()}
            self._rates = {i: walks[t.p] / self._relative[i] for i, t in step.tensors.items()}
        super().after_step(step)

    def watch(self, places: Sequence[int], tensor: ConstrainedTensor, d: Tensor, inner: bool = False) -> None:
        """Add up Σ d² of the last step before an update."""
        if tensor.part.counts:
            seen = self._inner if inner else self._steps
            squares = d.to(torch.promote_types(d.dtype, torch.float32)).square().reshape(len(places), -1).sum(dim=1)
            key = tuple(places)
            seen[key] = seen[key] + squares if key in seen else squares

    def seen(self, count: int, device: torch.device) -> Tensor:
        """Return Σ d² of the step before an update, off the mask and on it, of this process, ``(tensors, 2)``."""
        steps = torch.zeros(count, 2, dtype=exact_dtype(device), device=device)
        for column, seen in enumerate((self._steps, self._inner)):
            for places, squares in seen.items():
                steps[sent(places, device), column] = squares.to(steps.dtype)
        return steps

    def forgets(
        self, optimizer: Optimizer, tensors: Mapping[int, ConstrainedTensor], progress: float
    ) -> dict[int, Forgets]:
        """Return c ‖d‖ at this step's learning rate, and Σ ‖d‖ since the mask was fixed."""
        if not len(self._pace):
            return {}
        rates, self._peaks = relative_rates(optimizer, self._peaks)
        found = {}
        for i, tensor in tensors.items():
            self._paths[i] = self._paths.get(i, 0.0) + rates[tensor.p]
            found[i] = (self._pace[i] * (self._SETTLED * progress * rates[tensor.p]), self._pace[i] * self._paths[i])
        return found

    def factors(self, sums: Sums, rescale: float, penalty: float, span: int) -> Tensor:
        """Return θ, and update ρ."""
        count = len(sums.z)
        if len(self._slow) != count:
            self._slow, self._memory = torch.ones_like(sums.z), torch.zeros_like(sums.z)
            self._pace = torch.zeros_like(sums.z)
        w = _rms(sums.z, sums.kept)
        before = _rms(sums.memory, sums.entries - sums.former)
        most = torch.maximum(w / penalty, self._memory) if penalty > 0 else torch.full_like(w, torch.inf)
        tiny = torch.finfo(before.dtype).tiny
        theta = (most / before.clamp_min(tiny) * _STEPS).floor() / _STEPS
        theta = torch.where(before > most * (1 + 1e-4), theta, 1.0)
        self._memory = theta * _rms(sums.cut, sums.entries - sums.kept)
        factors = torch.tensor([self._rates.get(i, 0.0) for i in range(count)], device=w.device, dtype=w.dtype)
        sigma = _rms(sums.steps, sums.entries - sums.former) * factors
        slow = sigma * (math.sqrt(max(span, self._LEAST_STEPS)) / self._NOISE) / w
        self._slow = torch.where((sigma > 0) & (w > 0), slow.bfloat16().to(slow.dtype), self._slow)
        relative = torch.tensor([self._relative.get(i, 1.0) for i in range(count)], device=w.device, dtype=w.dtype)
        pace = (_rms(sums.inner, sums.former) / relative).bfloat16().to(w.dtype)
        self._pace = torch.where(sums.inner > 0, pace, self._pace)
        self._rates, self._relative, self._paths = {}, {}, {}
        return theta

    def inverse_penalty(self, tensor: ConstrainedTensor, penalty: float, off: Tensor, kept: Tensor) -> Any:
        """Return the largest 1/λ whose multiplier D⁻¹∇f/λ is within w/κ; 0 where there is no gradient."""
        return torch.where(off > 0, kept / (penalty * off.clamp_min(torch.finfo(off.dtype).tiny)), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return ρ, the size of the dual, the size and path of the steps, and the largest learning rates."""
        numbers = {"slow": self._slow, "memory": self._memory, "pace": self._pace}
        paths = {str(place): path for place, path in self._paths.items()}
        return {**{name: t.tolist() for name, t in numbers.items()}, "peaks": list(self._peaks), "paths": paths}

    def load_state_dict(self, state_dict: dict[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._slow, self._memory, self._pace = (
            torch.tensor(state_dict[name], device=device, dtype=exact_dtype(device))
            for name in ("slow", "memory", "pace")
        )
        self._peaks = list(state_dict["peaks"])
        self._paths = {int(place): path for place, path in state_dict["paths"].items()}


def _walk(group: dict[str, Any]) -> float:
    """Return how much further steps without drift walk than independent ones, because momentum repeats them."""
    beta = float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0) or 0.0)
    return math.sqrt((1 + beta) / max(1e-6, 1 - beta))


def _rms(squares: Tensor, count: Tensor) -> Tensor:
    return (squares / count.clamp_min(1)).sqrt()
