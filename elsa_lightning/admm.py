"""ADMM over any torch optimizer: minimise the true loss under a hard sparsity constraint.

Lee et al., 2026 (arXiv:2510.01650). With x the weights, S the set, λ the penalty and u the scaled dual:

    x   optimizer steps on f(x) + λ/2 ‖x − z + u‖²      every step
    z   Π_S(x + u), weighted by the second moment F̂     every ``interval`` steps
    u   u + x − z                                        with z

A projection that keeps or zeroes entries leaves z and u with disjoint supports: with v = x + u, z is v on
the mask and u is v off it. Their difference s = z − u is all the x-update needs, so one tensor ``elsa_split``
and one mask ``elsa_mask`` in ``optimizer.state[p]`` replace z, u and the former mask, and give the same iterates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.forms import Prox, add_proximal_gradient, check_prox, pull, relative_rates, remember
from elsa_lightning.layout.flat import as_dense, take_dense
from elsa_lightning.layout.lowbit import BLOCK, StateDtype, check_state_dtype
from elsa_lightning.layout.sharded import check_rows, local, parts_of
from elsa_lightning.layout.tensors import KEYS, MASK, REMOVED, SCALE, SPLIT, ConstrainedTensor
from elsa_lightning.optim.guard import Guard
from elsa_lightning.optim.hooks import StepHooks
from elsa_lightning.optim.moments import WeightRounding, dtype_name, set_up
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets.unstructured import Constraint, Point, Points

log = logging.getLogger(__name__)

_OF_WEIGHTS, _OF_STEPS, _OF_UPDATES = range(3)  # what random numbers are used for


@dataclass(frozen=True)
class Update:
    """What one z/u-update found, as scalars on the weights' device.

    Attributes:
        step: Optimizer steps done.
        penalty: λ or κ from here on.
        sparsity: Fraction of zeros in z, over all constrained entries.
        primal_residual: ‖x − z‖ / ‖x‖.
        dual_residual: penalty · ‖z − z_before‖.
        mask_flips: Fraction of the mask that changed.
    """

    step: int
    penalty: float
    sparsity: Tensor
    primal_residual: Tensor
    dual_residual: Tensor
    mask_flips: Tensor


class ADMM:
    """Constrains parameters of an optimizer; from then on ``optimizer.step()`` does the rest.

    Example::

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        admm = ADMM(optimizer, select(model).parameters, Unstructured(0.9), total_steps=1000)
        ...                      # the training loop as it was
        admm.finish()            # exact zeros

    The forms of the x-update:

    * ``coupled``, as published: λ(x − s) is added to the gradient after accumulation and clipping, and goes
      through the optimizer's moments.
    * ``decoupled``: ADMM in the optimizer's own metric. After its step x ← (x + γ s)/(1 + γ) with
      γ = κ · lr/lr_max, as decoupled weight decay does; the second moment stays an estimate of ∇f alone. lr_max is
      the group's ``max_lr`` or ``initial_lr``, or the largest rate so far if that is more.
    * ``hard``: x-update and z-update take turns at every step, so the weights stay on the set: from z the
      optimizer makes its step d, on the mask z ← z + d, off it u ← u + d/κ, the x-update linearised at z in the
      optimizer's metric. Only the support waits for the next projection. The dual is the memory of what was
      cut: an entry returns when the loss has asked for it long enough. With κ = 1 this is the feedback of Lin
      et al., 2020 (arXiv:2006.07253); a larger κ forgets more.

    Attributes:
        paused: While True the optimizer steps as if nothing was attached.

    Args:
        optimizer: Any torch optimizer. One without a second moment is projected by magnitude.
        parameters: What to constrain, by name; see :func:`elsa_lightning.selection.select`. They may be DTensors,
            sharded in any way that keeps 8 entries of a row together (32 with ``state_dtype`` float8), or the flat
            slices of FSDP1, once :func:`elsa_lightning.layout.sharded.mark_slices` has seen the model.
        constraint: The set S.
        total_steps: Optimizer steps of the whole run.
        schedule: The course of penalty, sparsity, projections and frozen phase.
        prox: The form of the x-update.
        state_dtype: What ``elsa_split`` is kept in; the arithmetic is float32. See :mod:`elsa_lightning.layout.lowbit`.

    Weights in bfloat16 are rounded stochastically after each step; see
    :class:`elsa_lightning.optim.moments.WeightRounding`. A step whose gradients are not finite is skipped.

    Raises:
        ValueError: A parameter is not the optimizer's or cannot be in the set, or an argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        constraint: Constraint,
        *,
        total_steps: int,
        schedule: Schedule | None = None,
        prox: Prox = "hard",
        state_dtype: StateDtype = "float32",
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be 1 or more optimizer steps, got {total_steps}")
        if not parameters:
            raise ValueError("parameters is empty: there is nothing to constrain")
        self.optimizer = optimizer
        self.constraint = constraint
        self.total_steps = total_steps
        self.schedule = schedule or Schedule()
        self.prox = check_prox(prox)
        if prox == "hard" and self.schedule.penalty == 0:
            raise ValueError("prox 'hard' divides by the penalty, which is 0; give a penalty above 0")
        self.state_dtype = check_state_dtype(state_dtype)
        self._find_parts()
        self.sharded = any(part.sharded for part in self._parts.values())
        self._flat = any(part.start is not None for part in self._parts.values())
        self.tensors = {name: self._constrain(name, p) for name, p in parameters.items()}
        self.step = 0
        self.penalty = 0.0
        self.finished = False
        self.paused = False
        self.last_update: Update | None = None
        self._told: set[str] = set()
        self._guard = Guard(optimizer, self._add)
        self._weights = WeightRounding()
        self._calls = 0  # of the optimizer's step
        self._peaks: list[float] = []  # largest learning rate of each group
        self._saves = optimizer.register_state_dict_post_hook(self._as_dense) if self._flat else None
        self._hooks = StepHooks(optimizer, KEYS, self._gradients_are_final, self._after_step, self._weights.undo)

    def _find_parts(self) -> None:
        self._parts = parts_of(p for group in self.optimizer.param_groups for p in group["params"])
        self._places = {p: place for place, p in enumerate(self._parts)}

    def _constrain(self, name: str, p: nn.Parameter) -> ConstrainedTensor:
        part = self._parts.get(p)
        self.constraint.check(name, p.shape if part is None else part.shape)
        if part is not None and part.start is not None and len(part.shape) > 2 and math.prod(part.shape[-2:]) % BLOCK:
            raise ValueError(
                f"{name} is a stack of matrices of {math.prod(part.shape[-2:])} entries, and in flat slices (FSDP1) "
                f"these must be a multiple of {BLOCK}: shard the model with ModelParallelStrategy (FSDP2)"
            )
        if part is None:
            raise ValueError(
                f"{name} is constrained but {type(self.optimizer).__name__} does not train it; give the optimizer that "
                f"does, or leave the parameter out"
            )
        check_rows(name, p, BLOCK if self.state_dtype == "float8_e4m3fn" else 8)
        return ConstrainedTensor(p, part, self.optimizer, self.state_dtype)

    def detach(self) -> None:
        """Take the hooks off the optimizer; its state stays."""
        self._hooks.remove()
        if self._saves is not None:
            self._saves.remove()

    @property
    def frozen(self) -> bool:
        """Whether the mask is fixed and the zeros are exact after every step."""
        return self._any(MASK) and not self._any(SPLIT)

    @property
    def suspended(self) -> bool:
        """Whether :meth:`finish` left the means to go on."""
        return self._any(REMOVED)

    def _any(self, key: str) -> bool:
        return any(tensor.has(key) for tensor in self.tensors.values())

    def _with(self, key: str) -> list[ConstrainedTensor]:
        return [tensor for tensor in self.tensors.values() if tensor.has(key)]

    def _active(self) -> list[ConstrainedTensor]:
        """Return the tensors that the optimizer has stepped, the same on every process.

        The others wait for their first gradient: state put in before it breaks an optimizer's own set-up.
        """
        tensors = list(self.tensors.values())
        active = [bool(tensor.state) or tensor.p.grad is not None for tensor in tensors]
        return [tensor for tensor, yes in zip(tensors, self._on_any(active), strict=True) if yes]

    def _on_any(self, flags: list[bool]) -> list[bool]:
        """Say of each whether it is so on any process; only a flat slice can be empty, and then knows nothing."""
        if not self._flat:
            return flags
        found = torch.tensor(flags, dtype=torch.float32, device=next(iter(self._parts)).device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    def expect(self, keys: Mapping[nn.Parameter, Collection[str]]) -> None:
        """Make room for a state that will be loaded by name, which finds nothing else.

        Args:
            keys: Names of the state of each parameter.
        """
        set_up(self.optimizer, [p for p, names in keys.items() if set(names) - set(KEYS)])
        for tensor in self.tensors.values():
            names = [key for key in KEYS if key in keys.get(tensor.p, ())]
            tensor.release(*KEYS)
            tensor.allocate(*names)

    def masks(self) -> dict[str, Tensor]:
        """Return the current masks by parameter name, True where kept; empty before the first step.

        Each is this process's part, ``(out, in)`` or ``(experts, out, in)``, of a flat slice ``(n,)``.
        """
        return dict(self.each_mask())

    def each_mask(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what :meth:`masks` returns, so that no two masks need be there at once."""
        for name, tensor in self.tensors.items():
            if tensor.has(MASK):
                yield name, tensor.mask(slice(0, tensor.rows)).view(local(tensor.p).shape)

    def occupancy(self) -> tuple[list[str], Tensor]:
        """Return names and, float64 ``(tensors, 4)``, kept entries, entries, empty rows and rows of each tensor.

        Rows are not counted where shards cut them.
        """
        tensors = {name: tensor for name, tensor in self.tensors.items() if tensor.has(MASK)}
        counts = torch.zeros(len(tensors), 4, dtype=torch.float64, device=next(iter(self._parts)).device)
        for index, tensor in enumerate(tensors.values()):
            whole_rows = tensor.part.start is None and local(tensor.p).shape[-1] == tensor.part.shape[-1]
            for rows, *_ in tensor.pieces() if tensor.part.counts else ():
                mask = tensor.mask(rows)
                empty = (~mask.any(dim=1)).sum() if whole_rows else mask.new_zeros(())
                numbers = [mask.sum(), mask.numel(), empty, len(mask) * whole_rows]
                counts[index] += torch.stack([torch.as_tensor(n, device=counts.device).double() for n in numbers])
        return list(tensors), self._add(counts)

    def _add(self, t: Tensor) -> Tensor:
        """Return the sum, in place, over the processes that hold different entries; each adds what it counts."""
        if self.sharded:
            dist.all_reduce(t)
        return t

    def _seed(self, p: nn.Parameter, use: int) -> int:
        """Return a seed that any run draws again, resumed or on other processes: of the step, the tensor, the use."""
        return (self._calls << 24) + (self._places[p] << 2) + use

    # ------------------------------------------------------------------ inside the optimizer's step

    def _gradients_are_final(self, loss: Any) -> None:
        """Skip the step if it cannot be made, else prepare it."""
        if sum(len(group["params"]) for group in self.optimizer.param_groups) > len(self._parts):
            self._find_parts()  # somebody added a group
        if self.paused:
            return
        if self._guard.skips(self.step, loss):
            return
        if self.prox == "coupled" and self.penalty > 0 and not self.frozen:
            add_proximal_gradient(self._with(SPLIT), self.penalty, getattr(self.optimizer, "grad_scale", None))
        if (warning := self._weights.set_aside(self.optimizer)) is not None:
            self._warn_once(warning)

    @torch.no_grad()
    def _after_step(self) -> None:
        self._calls += 1
        self._weights.put_back(self._noise)
        if self._guard.skipped or not self._stepped():
            return
        if self._only_sets_up():
            for tensor in self.tensors.values():
                if tensor.state:
                    tensor.allocate(SPLIT, SCALE, MASK)
            return
        if self.paused:
            return
        if self.step == 0 and not self.finished:  # what another run left in the optimizer
            for tensor in self.tensors.values():
                tensor.release(*KEYS)
        self.step += 1
        if self.frozen or self.finished:
            self._keep_frozen()
            return
        if self.penalty > 0 and self.step > 1:
            if self.prox == "hard":
                remember(self._with(SPLIT), self.penalty, lambda p: self._seed(p, _OF_STEPS))
            elif self.prox == "decoupled":
                rates, self._peaks = relative_rates(self.optimizer, self._peaks)
                pull(self._with(SPLIT), {p: self.penalty * rate for p, rate in rates.items()})
        freezes = self.schedule.frozen > 0 and self.step >= self.schedule.freeze_step(self.total_steps)
        if freezes or self.schedule.projects_at(self.step, self.total_steps):  # a resumed run may freeze late
            self._update()
        if freezes:
            self._freeze()

    def _keep_frozen(self) -> None:
        """Put the zeros back; a tensor that gets its first gradient now is projected once."""
        late = [tensor for tensor in self.tensors.values() if tensor.stepped and not tensor.has(MASK)]
        if late:
            self._project_in_place(late, resumable=False)
        for tensor in self._with(MASK):
            for rows, *_ in tensor.pieces():
                tensor.x(rows).mul_(tensor.mask(rows))

    def _noise(self, p: nn.Parameter) -> Tensor:
        part, shape = self._parts[p], local(p).shape or torch.Size((1,))
        rows = slice(0, math.prod(shape[:-1]) if part.start is None else p.numel())
        return part.noise(shape, rows, self._seed(p, _OF_WEIGHTS), p.device).view(local(p).shape)

    def _stepped(self) -> bool:
        """Say whether the optimizer really stepped: a skipped batch or an overflow fires the hooks too."""
        overflow = getattr(self.optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return False
        if self._flat:  # a process may hold nothing of what is constrained
            return any(p.grad is not None for p in self._parts)
        return any(t.p.grad is not None for t in self.tensors.values())

    def _only_sets_up(self) -> bool:
        """Say whether this is the step on zero gradients by which a distributed checkpoint makes room for itself."""
        if self.step > 0 or any(float(group["lr"]) != 0 for group in self.optimizer.param_groups):
            return False
        return not any(bool(local(p.grad).any()) for p in self._parts if p.grad is not None)

    # ------------------------------------------------------------------ projections

    def _dual_sum(self, tensor: ConstrainedTensor, rows: slice) -> Tensor:
        """v = x + u, with u = 0 on the mask and −s off it."""
        x = tensor.x(rows)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x - tensor.split(rows).masked_fill(tensor.mask(rows), 0) if tensor.has(SPLIT) else x

    def _update(self) -> None:
        """z ← Π_S(v); u ← v − z, rescaled to the new penalty; s ← z − u; and what a user watches."""
        before, self.penalty = self.penalty, self.schedule.penalty_at(self.step, self.total_steps)
        rescale = before / self.penalty if self.penalty > 0 else 0.0  # u = y/λ for the true multiplier y
        if self.prox == "hard" and before == 0:
            rescale = 1.0  # what the first mask cuts is remembered too, or a mask of one batch's F̂ would stay
        target = self.constraint.relaxed(self.schedule.tightness_at(self.step, self.total_steps))
        points = _Pieces(self, self._active(), self._dual_sum)
        masks = target.project(points)
        sums = torch.zeros(5, dtype=torch.float64, device=points.device)
        for tensor in points.tensors:
            seed, fresh = self._seed(tensor.p, _OF_UPDATES), not tensor.has(SPLIT)
            tensor.allocate(SPLIT, SCALE, MASK)
            for rows, *_ in tensor.pieces():
                v, x = self._dual_sum(tensor, rows), tensor.x(rows)
                mask = next(masks).view(v.shape)
                z = v.masked_fill(~mask, 0)
                former = torch.ones_like(mask) if fresh else tensor.mask(rows)
                z_before = x.to(v.dtype) if self.prox == "hard" or fresh else tensor.split(rows)
                z_before = z_before.masked_fill(~former, 0)
                if tensor.part.counts:
                    sums += torch.stack(
                        [(x - z).square().sum(), x.to(v.dtype).square().sum(), (z - z_before).square().sum(),
                         (mask ^ former).sum().to(v.dtype), mask.sum().to(v.dtype)]
                    ).double()  # fmt: skip
                tensor.set_mask(rows, mask)
                tensor.set_split(rows, torch.where(mask, 0 if self.prox == "hard" else v, v * -rescale), seed)
                if self.prox == "hard":
                    x.copy_(z)
        next(masks, None)
        gap, norm, moved, flips, kept = self._add(sums)
        entries = sum(shape.numel() for shape in points.shapes)
        self.last_update = Update(
            step=self.step,
            penalty=self.penalty,
            sparsity=1 - kept / entries,
            primal_residual=(gap / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sqrt(),
            dual_residual=self.penalty * moved.sqrt(),
            mask_flips=flips / entries,
        )

    def _freeze(self) -> None:
        """Fix the mask, make the zeros exact, and release the split."""
        for tensor in self._with(MASK):
            for rows, *_ in tensor.pieces():
                tensor.x(rows).masked_fill_(~tensor.mask(rows), 0)
            tensor.release(SPLIT, SCALE)

    @torch.no_grad()
    def finish(self, resumable: bool = False) -> None:
        """x ← Π_S(x): make the zeros exact.

        Args:
            resumable: Keep what is removed in the optimizer's state, so that :meth:`resume` goes on as if
                nothing had happened. For runs that end before their last step.
        """
        self.recover()
        if self.finished or (resumable and (self.suspended or self.step == 0)):
            return
        self.resume()
        fixed = self._with(MASK) if self.frozen else []
        free = [tensor for tensor in self.tensors.values() if tensor not in fixed]
        for tensor in fixed:
            self._cut(tensor, (tensor.mask(rows) for rows, *_ in tensor.pieces()), resumable)
        if free:
            self._project_in_place(free, resumable)
        self.finished = not resumable

    def _project_in_place(self, tensors: list[ConstrainedTensor], resumable: bool) -> None:
        masks = self.constraint.project(_Pieces(self, tensors, lambda tensor, rows: tensor.x(rows)))
        for tensor in tensors:
            self._cut(tensor, masks, resumable)
        next(masks, None)

    def recover(self) -> None:
        """Return to the weights before an optimizer's step that raised, if one did."""
        self._weights.undo()
        self._hooks.reset()

    def _cut(self, tensor: ConstrainedTensor, masks: Iterator[Tensor], resumable: bool) -> None:
        keeps = resumable or tensor.stepped or self._flat  # state put in before the optimizer's own breaks its set-up
        tensor.allocate(*[REMOVED if resumable else MASK] * keeps)
        for rows, *_ in tensor.pieces():
            x = tensor.x(rows)
            mask = next(masks).view(x.shape)
            if resumable:
                tensor.set_removed(rows, x.masked_fill(mask, 0))
            elif keeps:
                tensor.set_mask(rows, mask)
            x.masked_fill_(~mask, 0)
        if not resumable:
            tensor.release(SPLIT, SCALE)

    @torch.no_grad()
    def resume(self) -> None:
        """Undo ``finish(resumable=True)``, bit for bit; does nothing otherwise."""
        for tensor in self._with(REMOVED):
            for rows, *_ in tensor.pieces():
                x, removed = tensor.x(rows), tensor.removed(rows)
                x.copy_(torch.where(removed != 0, removed, x))
            tensor.release(REMOVED)

    # ------------------------------------------------------------------ saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Return the scalars; the tensors are in the optimizer's state."""
        return {
            "step": self.step,
            "penalty": self.penalty,
            "finished": self.finished,
            "calls": self._calls,
            "peaks": list(self._peaks),
            "total_steps": self.total_steps,
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scalars, after model and optimizer were loaded.

        Raises:
            ValueError: The state comes from a run with other settings.
        """
        theirs, ours = state_dict["settings"], self._settings()
        different = [key for key in ours if theirs.get(key) != ours[key]]
        if different:
            changes = ", ".join(f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in different)
            raise ValueError(
                f"the checkpoint is of a run with other settings ({changes}). Resume with the settings it was made "
                f"with, or start a new run from its weights without resuming"
            )
        self._take_over()
        if state_dict["step"] > 0 and not self._any(MASK):
            raise ValueError(
                f"the checkpoint counts {state_dict['step']} ADMM steps but the optimizer's state has no masks; load "
                f"the optimizer's state first, from a checkpoint that has it (no save_weights_only)"
            )
        if state_dict["total_steps"] != self.total_steps:
            log.warning(
                "The checkpoint was made in a run of %d steps, this one has %d: penalty, ramp and frozen phase follow "
                "the new length.", state_dict["total_steps"], self.total_steps,
            )  # fmt: skip
        self.step, self.penalty, self.finished = state_dict["step"], state_dict["penalty"], state_dict["finished"]
        self._calls, self._peaks = state_dict["calls"], list(state_dict["peaks"])
        self.resume()

    def _as_dense(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return as_dense(optimizer, state_dict, self._by_parameter(), self._parts)

    @torch.no_grad()
    def _take_over(self) -> None:
        """Turn loaded state that was saved under FSDP1 into ours, and see that every process knows of the same."""
        take_dense(self.optimizer, self._by_parameter())
        if self._flat:
            tensors = list(self.tensors.values())
            for key in KEYS:
                for tensor, yes in zip(tensors, self._on_any([t.has(key) for t in tensors]), strict=True):
                    tensor.allocate(*[key] * yes)

    def _by_parameter(self) -> dict[nn.Parameter, ConstrainedTensor]:
        return {tensor.p: tensor for tensor in self.tensors.values()}

    def _settings(self) -> dict[str, Any]:
        names = sorted(f"{name}{tuple(tensor.part.shape)}" for name, tensor in self.tensors.items())
        return {
            "constraint": repr(self.constraint),
            "prox": self.prox,
            "state_dtype": self.state_dtype,
            "constrained tensors": names,
            **asdict(self.schedule),
        }

    def importance(self, tensor: ConstrainedTensor, rows: slice) -> Tensor | None:
        """Return what a squared change of each weight costs, or None where the optimizer keeps no second moment.

        F̂ as published for ``coupled``; √F̂, the metric that the optimizer's own steps are in, for the other forms.
        """
        moment = tensor.importance(rows)
        if moment is None and (tensor.stepped or tensor.p.grad is not None):
            self._warn_once(
                f"{type(self.optimizer).__name__} keeps no second moment, so weights are ranked by magnitude alone; an "
                f"Adam makes the projection aware of the loss."
            )
        elif moment is not None and moment.dtype.itemsize == 2:
            self._warn_once(
                f"{type(self.optimizer).__name__} keeps its second moment in {dtype_name(moment.dtype)}, where a step "
                f"of beta2 = 0.999 is lost to rounding and old gradients never fade. Use bitsandbytes' Adam8bit, or "
                f"keep float32 weights (precision bf16-mixed)."
            )
        return moment if moment is None or self.prox == "coupled" else moment.sqrt()

    def _warn_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning(message)


class _Pieces(Points):
    """The points to project, made a piece at a time at each iteration."""

    def __init__(
        self, admm: ADMM, tensors: list[ConstrainedTensor], value: Callable[[ConstrainedTensor, slice], Tensor]
    ) -> None:
        self.admm, self.tensors, self.value = admm, tensors, value
        self.shapes = [tensor.part.shape for tensor in tensors]
        self.parts = dist.get_world_size() if any(tensor.part.sharded for tensor in tensors) else 1
        self.device = tensors[0].p.device

    def __iter__(self) -> Iterator[Point]:
        for index, tensor in enumerate(self.tensors):
            for rows, matrix, matrices in tensor.pieces():
                v = self.value(tensor, rows)
                yield Point(v, self.admm.importance(tensor, rows), index, matrix, matrices, tensor.part)

    def add(self, t: Tensor) -> Tensor:
        return self.admm._add(t)
