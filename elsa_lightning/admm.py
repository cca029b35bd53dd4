"""ADMM over any torch optimizer: minimise the true loss under a hard sparsity constraint.

Lee et al., 2026 (arXiv:2510.01650). With x the weights, S the set, λ the penalty and u the scaled dual:

    x   optimizer steps on f(x) + λ/2 ‖x − z + u‖²      every step
    z   Π_S(x + u), weighted by the second moment F̂     every ``interval`` steps
    u   u + x − z                                        with z

A projection that keeps or zeroes entries leaves z and u with disjoint supports: with v = x + u, z is v on
the mask and u is v off it. Their difference s = z − u is all the x-update needs, so one tensor ``elsa_split``
and one mask ``elsa_mask`` in ``optimizer.state[p]`` replace z, u and the former mask, and give the same iterates.

This is the published x-update. The ``prox`` argument selects which variant a run uses (:mod:`elsa_lightning.forms`);
the default, ``linearized``, brings x to the set after every step and stores only −u. :class:`ADMM` itself attaches to
the optimizer, orders the operations of a step, tracks the phase of the run, and saves and loads its state.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning import exact, watch
from elsa_lightning import update as updates
from elsa_lightning.anatomy import Homes
from elsa_lightning.constrained import ConstrainedTensors
from elsa_lightning.errors import UserError
from elsa_lightning.fisher import share_of, steadied
from elsa_lightning.forms import Form, Prox, Step, make_form
from elsa_lightning.forms.base import Forgets, Importance
from elsa_lightning.layout.lowbit import StateDtype, check_state_dtype
from elsa_lightning.layout.sharded import Processes, clean, local
from elsa_lightning.optim.guard import Guard
from elsa_lightning.optim.hooks import StepHooks, innermost
from elsa_lightning.optim.moments import dtype_name, rate_of
from elsa_lightning.optim.rounding import WeightRounding, stale_curvature
from elsa_lightning.rate import Damage, blocks
from elsa_lightning.report import some
from elsa_lightning.schedule import Schedule
from elsa_lightning.selection import Selection
from elsa_lightning.sets.base import Constraint, check_set
from elsa_lightning.tensors import KEYS, MASK, NUMBERS, REMOVED, SCALE, SPLIT, ConstrainedTensor

log = logging.getLogger(__name__)

Phase = Literal["setting up", "admm", "frozen", "finished", "suspended"]

_OF_WEIGHTS, _OF_STEPS, _OF_UPDATES = range(3)  # uses of random numbers: each has seeds of its own
_ATTACHED: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[ADMM]] = weakref.WeakKeyDictionary()


class ADMM:
    """Constrains parameters of an optimizer; from then on ``optimizer.step()`` prunes them as well.

    Example::

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        admm = ADMM(optimizer, select(model).parameters, Unstructured(0.9), total_steps=1000)
        ...                      # the training loop as it was
        admm.finish()            # exact zeros

    Attributes:
        phase: ``setting up`` until the first update, ``admm`` while the mask moves, ``frozen`` when the mask is fixed
            and the zeros are exact after every step, ``finished`` at the end, ``suspended`` between :meth:`finish` with
            ``resumable`` and :meth:`resume`.
        paused: While True, the optimizer steps as if nothing were attached.
        last_update: Residuals and sparsity of the latest update.
        last_stationarity: Distance of the weights from a stationary point at the latest measurement.

    Args:
        optimizer: Any torch optimizer, or accelerate's or Fabric's wrapper of one. Without a second moment, weights are
            projected by magnitude.
        parameters: What to constrain: names and parameters, or the result of :func:`elsa_lightning.select`. They may be
            DTensors, sharded in any way that keeps 8 entries of a row together (32 with ``state_dtype`` float8), or the
            flat slices of FSDP1, if :func:`elsa_lightning.layout.fsdp1.mark_slices` was called on the model before.
        constraint: The set S.
        total_steps: Optimizer steps of the whole run.
        schedule: The course of penalty, sparsity, projections and frozen phase.
        prox: The form of the x-update: ``linearized`` (the default), ``decoupled``, ``coupled``, ``published`` or
            ``feedback``, described in :mod:`elsa_lightning.forms`, or a form of your own, which is copied.
        state_dtype: The dtype in which ``elsa_split`` is stored; the arithmetic is float32. See
            :mod:`elsa_lightning.layout.lowbit`.
        replicas: The processes that train copies of the parameters (DDP), so that they skip a broken step together.
            All of them must make the same number of steps, each with gradients of the same tensors: uneven inputs
            (``torch.distributed.algorithms.Join``) are not supported, so drop the last batches that not all have.
            Processes that hold shards of the parameters need not be given.

    Weights in bfloat16 are rounded stochastically after each step; see
    :class:`elsa_lightning.optim.rounding.WeightRounding`. A step whose gradients are not finite is skipped.

    Raises:
        ValueError: A parameter is not the optimizer's or cannot be in the set, or an argument is out of range.
    """

    _room: Collection[str] = (SPLIT, SCALE, MASK, NUMBERS)  # tensors that a distributed checkpoint may hold
    later: Mapping[str, nn.Parameter] = MappingProxyType({})  # joining once the optimizer has them (KeptZeros)

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter] | Selection | Iterable[tuple[str, nn.Parameter]],
        constraint: Constraint,
        *,
        total_steps: int,
        schedule: Schedule | None = None,
        prox: Prox | Form = "linearized",
        state_dtype: StateDtype = "float32",
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        if total_steps < 1:
            raise UserError(f"total_steps must be 1 or more optimizer steps, got {total_steps}")
        parameters = dict(parameters.parameters if isinstance(parameters, Selection) else parameters)
        if not (parameters or self.later):
            raise UserError("parameters is empty: there is nothing to constrain")
        optimizer = innermost(optimizer)
        check_set(constraint, "constraint")
        take_from_others(optimizer, parameters)
        self.optimizer, self.total_steps = optimizer, int(total_steps)
        self.form, schedule = copy.deepcopy(make_form(prox)), schedule or Schedule()  # a form measures its run
        self.schedule = replace(schedule, penalty=self.form.penalty) if schedule.penalty is None else schedule
        self.form.check(self.schedule, constraint)
        self.state_dtype = check_state_dtype(state_dtype)
        self.tensors = ConstrainedTensors(optimizer, parameters, constraint, self.state_dtype)
        self.constraint = self.tensors.constraint
        self.step = 0
        self.penalty = 0.0
        self._tightness, self._relaxed = 1.0, self.constraint  # tightness and relaxed set of the last update
        self.phase: Phase = "setting up"
        self._suspended_from: Phase = "setting up"
        self.paused = False
        self.last_update: watch.Update | None = None
        self.last_stationarity: watch.Stationarity | None = None
        self._told: set[str] = set()
        deciding = Processes([*self.tensors.processes.groups, *([] if replicas is None else [replicas])])
        self._guard = Guard(optimizer, deciding, copies=replicas is not None and not self.tensors.flat)
        self._weights = WeightRounding()
        self._calls = 0  # calls of the optimizer's step
        self._waiting: list[ConstrainedTensor] = []  # tensors without a gradient when the mask was fixed
        self._guesses: dict[Hashable, Tensor] = {}  # thresholds of the last update; only speed depends on them
        self._copies: list[str] = []  # keys of the optimizer's state that hold copies of the weights
        self._graded = False  # whether the current step has gradients
        self._masked = 0  # tensors with a mask on this process
        self._homes = Homes({} if self.sharded else {**parameters, **self.later})  # FSDP exchanges parameters
        self._idle: set[str] = set()  # tensors without a gradient in the last step
        low = any(p.dtype == torch.bfloat16 for p in self.tensors.parts)
        self._hooks = StepHooks(
            optimizer, KEYS, self._gradients_are_final, self._after_step, self._weights.undo, catches=low
        )
        _ATTACHED.setdefault(optimizer, weakref.WeakSet()).add(self)

    def detach(self, saves: bool = False) -> None:
        """Remove the hooks from the optimizer; its state stays.

        Args:
            saves: Whether flat slices (FSDP1) are still to be saved, which needs one of the hooks.
        """
        self._hooks.remove()
        if not saves:
            self.tensors.remove()
        _ATTACHED.get(self.optimizer, weakref.WeakSet()).discard(self)

    def _give_up(self, parameters: Collection[nn.Parameter]) -> None:
        """Leave parameters to another ADMM, and go on holding the zeros of the rest."""
        rest = [tensor for tensor in self.tensors.values() if tensor.p not in parameters]
        if not rest or self.tensors.flat:
            if masked := [tensor.name for tensor in rest if tensor.has(MASK)]:
                log.warning(
                    "Elsa: the zeros of %s are held no longer, because another ADMM takes over some tensors of a model "
                    "sharded with FSDP1: give it these too.", some(masked),
                )  # fmt: skip
            return self.detach()
        self.tensors.give_up(parameters)
        self._waiting = [tensor for tensor in self._waiting if tensor.p not in parameters]
        self._masked = len(self.tensors.holding(MASK))
        return None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be copied or pickled, because the optimizer's hooks would not be copied along."""
        raise UserError(
            "an ADMM cannot be copied or pickled: it acts through hooks of its optimizer, which a copy has not, so it "
            "would prune nothing. Copy model and optimizer, make an ADMM for these, and call its load_state_dict() "
            "with what state_dict() of this one returns"
        )

    @property
    def prox(self) -> str:
        """The form of the x-update."""
        return self.form.name

    @property
    def sharded(self) -> bool:
        """Whether other processes hold other entries of the parameters."""
        return bool(self.tensors.processes.groups)

    @property
    def loaded(self) -> bool:
        """Whether the optimizer's state was loaded from a run whose :meth:`state_dict` was not."""
        return self._hooks.loaded

    @property
    def frozen(self) -> bool:
        """Whether the mask is fixed and the zeros are exact after every step."""
        return self.phase in ("frozen", "finished")

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.phase == "finished"

    @property
    def suspended(self) -> bool:
        """Whether the run was ended by :meth:`finish` with ``resumable`` and can go on."""
        return self.phase == "suspended"

    def masks(self) -> dict[str, Tensor]:
        """Return the current masks by parameter name, True where kept; empty before the first step.

        Each mask covers this process's part of a parameter and has its shape; for a flat slice that is ``(n,)``.
        """
        return dict(self.each_mask())

    def each_mask(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the items of :meth:`masks` one by one, so that only one unpacked mask takes memory."""
        yield from self.tensors.each_mask()

    def expect(self, keys: Mapping[nn.Parameter, Collection[str]]) -> None:
        """Allocate state that will be loaded by name, which fills existing tensors only; see ConstrainedTensors."""
        self.tensors.expect(keys)

    def shares(self) -> dict[str, float]:
        """Return the fraction of entries that each tensor with a mask keeps, by name, over all processes."""
        names, counts = self.occupancy()
        return dict(zip(names, (counts[:, 0] / counts[:, 1].clamp_min(1)).tolist(), strict=True))

    def occupancy(self) -> tuple[list[str], Tensor]:
        """Return the counts of :func:`elsa_lightning.watch.occupancy`, over all processes."""
        return watch.occupancy(list(self.tensors.values()), self.tensors.processes)

    @torch.no_grad()
    def score_histogram(self) -> Tensor | None:
        """Return the counts of :func:`elsa_lightning.watch.score_histogram`, or None while no mask moves."""
        tensors = self.tensors.holding(MASK)
        if self.phase != "admm" or not tensors:
            return None
        with self._steadied(tensors):
            return watch.score_histogram(
                tensors, lambda t, rows: updates.dual_sum(self.form, t, rows), self.importance, self.tensors.processes
            )

    def _seed(self, p: nn.Parameter, use: int) -> int:
        return self.tensors.seed(self._calls, p, use)

    # ------------------------------------------------------------------ inside the optimizer's step

    def _gradients_are_final(self, loss: Any) -> None:
        """Skip the step if its gradients are not finite, else prepare it."""
        groups = [group["params"] for group in self.optimizer.param_groups if group["params"]]
        parts = self.tensors.parts
        if sum(map(len, groups)) > len(parts) or any(group[0] not in parts for group in groups):
            self.tensors.find_parts()  # a parameter group was added or exchanged
            if gone := [tensor.name for tensor in self.tensors.values() if tensor.p not in self.tensors.parts]:
                raise UserError(
                    f"taken out of {type(self.optimizer).__name__} after ADMM was attached: {some(gone)}. Nothing "
                    f"prunes what it trains instead: make the optimizer and ADMM anew for these parameters"
                )
        if self.paused:
            return
        self._check_scalars()
        if self.suspended:
            self._warn_once(
                "Elsa: a step is made after finish(resumable=True), and the weights from before that are back for it. "
                "Call admm.resume() before the forward pass, so that its gradients are of these."
            )
            self.resume()
        self._graded = self._has_gradients()
        idle = {tensor.name: tensor.p for tensor in self.tensors.values() if tensor.p.grad is None}
        if idle.keys() - self._idle and (left := self._homes.left(idle)):
            raise UserError(
                f"replaced in the model after ADMM was attached: {some(left)}. The optimizer does not train what is "
                f"there now, and nothing prunes it. load_state_dict(assign=True), parametrizations such as "
                f"weight_norm, conversions and new layers replace parameters: do so before the optimizer and ADMM are "
                f"made, or load without assign, which copies in place"
            )
        self._idle = {*idle}
        if self._guard.skips(self.step, loss, len(self.tensors) - len(idle)):
            return
        scale = getattr(self.optimizer, "grad_scale", None)
        if self.phase == "admm":
            if scale is None:
                self._measure_stationarity()
            self.form.before_step(self.tensors.holding(SPLIT), self.penalty, scale)
        if any(other._weights.active for other in _ATTACHED.get(self.optimizer, ())):
            return  # which would be set aside a second time, as zeros
        call = self._calls + 1
        warning = self._weights.set_aside(
            self.optimizer, self.tensors.parts, lambda p: self.tensors.seed(call, p, _OF_WEIGHTS)
        )
        if warning is not None:
            self._warn_once(warning)

    @torch.no_grad()
    def _after_step(self) -> None:
        self._calls += 1
        graded, self._graded = self._graded or self._has_gradients(), False
        self._weights.put_back(self.tensors.parts, self._seeds_of(_OF_WEIGHTS))
        overflow = getattr(self.optimizer, "found_inf", None)  # hooks fire even if the step was skipped
        if self._guard.skipped or not graded or (overflow is not None and bool(overflow)):
            return
        if self._only_sets_up():
            for tensor in self.tensors.values():
                if tensor.state:
                    tensor.allocate(*self._room)
            return
        if self.paused:
            return
        if self.phase == "setting up":  # another run may have left its tensors in the optimizer's state
            for tensor in self.tensors.values():
                tensor.release(*KEYS)
        self.step += 1
        if self.step == self.total_steps + watch.slack(self.total_steps) + 1:
            self._warn_once(f"Elsa: {watch.off_schedule(self.step, self.step, self.total_steps)}.")
        if self._masked > len(self.tensors.holding(MASK)):
            raise UserError(
                f"masks have vanished from the state of {type(self.optimizer).__name__}: something replaced or cleared "
                f"optimizer.state. Load the last checkpoint, and clear no entries that begin with 'elsa_'"
            )
        if self.frozen:
            self._keep_frozen()
            return
        freezes = self.schedule.frozen > 0 and self.step >= self.schedule.freeze_step(self.total_steps)
        is_due = freezes or self.schedule.projects_at(self.step, self.total_steps)  # a resumed run may freeze late
        if self.phase == "admm":
            split = {place: t for place, t in enumerate(self.tensors.values()) if t.has(SPLIT)}
            seed = self._seeds_of(_OF_STEPS)
            self.form.after_step(Step(self.optimizer, split, self._relaxed, self.penalty, seed, is_due))
        if is_due:
            self._update()
        if freezes:
            self._freeze()

    def _seeds_of(self, use: int) -> Any:
        return lambda p: self._seed(p, use)

    def _keep_frozen(self) -> None:
        """Restore the zeros after a step; project a tensor once that gets its first gradient now."""
        flags = [tensor.stepped or tensor.p.grad is not None for tensor in self._waiting]
        if self._waiting and (late := self._complete(self.tensors.agreed(flags, self._waiting), widens=True)):
            self._waiting = [tensor for tensor in self._waiting if tensor not in late]
            self._project_in_place(late, resumable=False, stepped=True)
            self._masked = len(self.tensors.holding(MASK))
            for tensor in late if self.constraint.fixes_values and not self.finished else ():
                tensor.allocate(SPLIT, SCALE)
        forgets: dict[int, Forgets] = {}
        if self.constraint.fixes_values and not self.finished:
            start = self.schedule.freeze_step(self.total_steps)
            progress = min(1.0, (self.step - start) / max(1, self.total_steps - start))
            places = self.tensors.places
            remembering = {places[tensor.p]: tensor for tensor in self.tensors.holding(SPLIT)}
            forgets = self.form.forgets(self.optimizer, remembering, max(0.0, progress))
        refits = self.schedule.refits_at(self.step, self.total_steps) and not self.finished
        self._hold(self._seeds_of(_OF_STEPS), forgets, self.importance if refits else None)

    def _hold(
        self, seed: Callable[[nn.Parameter], int] | None, forgets: Mapping[int, Forgets],
        importance: Importance | None = None, values: bool = True,
    ) -> None:  # fmt: skip
        masked = self.tensors.holding(MASK)
        exact.hold(self.constraint, masked, self.tensors.places, self._copies, seed, forgets, importance, values)

    def _has_gradients(self) -> bool:
        """Return whether the step has gradients; the hooks also fire for a skipped batch, which has none."""
        if self.tensors.flat:  # a process may hold no entry of a constrained parameter
            return any(p.grad is not None for p in self.tensors.parts)
        return any(t.p.grad is not None for t in self.tensors.values())

    def _only_sets_up(self) -> bool:
        """Return whether this is the step on zero gradients by which a distributed checkpoint allocates state.

        A learning rate of 0 alone does not tell, because a warm-up begins with it, nor do one process's gradients,
        because it may hold no rows. So the processes agree.
        """
        if self.step > 0 or any(rate_of(group) != 0 for group in self.optimizer.param_groups):
            return False
        moves = any(bool(local(p.grad).any()) for p in self.tensors.parts if p.grad is not None)
        return not any(self.tensors.processes.any([moves], self.tensors.device))

    # ------------------------------------------------------------------ projections

    @torch.no_grad()
    def damage(self) -> Damage:
        """Return how much of the weights a projection to the set would remove now, without changing anything.

        Called before the first step, its ``rate`` is the peak learning rate with which Adam can make up for the cut.
        """
        points = updates.LivePoints(
            list(self.tensors.values()), lambda t, rows: t.x(rows), None, self.tensors.processes
        )
        whole, cut, entries = updates.damage(self.constraint, points).tolist()
        sizes = [(math.prod(t.part.shape), t.inputs) for t in self.tensors.values()]
        inputs = sum(size * inputs for size, inputs in sizes) / max(1, sum(size for size, _ in sizes))
        depth = blocks(clean(tensor.name) for tensor in self.tensors.values())
        return Damage(math.sqrt(whole / max(1.0, entries)), cut / whole if whole else 0.0, inputs, depth)

    def _points(
        self, tensors: Sequence[ConstrainedTensor], value: updates.Value, guesses: dict[Hashable, Tensor] | None = None
    ) -> updates.LivePoints:
        return updates.LivePoints(tensors, value, self.importance, self.tensors.processes, guesses, stacks=True)

    def _steadied(self, tensors: Sequence[ConstrainedTensor]) -> AbstractContextManager[None]:
        """Let F̂ of few batches be held towards the product of its means."""
        return steadied(tensors, self.tensors.processes, share_of(self.form.prior, max(1, self.step)))

    def _target(self, step: int) -> Constraint:
        return self.constraint.relaxed(self.schedule.tightness_at(step, self.total_steps))

    def _update(self) -> None:
        """z ← Π_S(v); u ← v − z, rescaled to the new penalty; s ← z − u."""
        before, self.penalty = self.penalty, self.schedule.penalty_at(self.step, self.total_steps)
        tensors = list(self.tensors.values())  # those without gradient or state wait for their first gradient
        flags = [bool(tensor.state) or tensor.p.grad is not None for tensor in tensors]
        active = self._complete(self.tensors.agreed(flags, tensors))
        if not active:  # none has either, or a set that decides about all its tensors at once lacks one
            return
        if (stale := stale_curvature(self.optimizer)) is not None:
            self._warn_once(f"Elsa: {stale}.")
        self._tightness = self.schedule.tightness_at(self.step, self.total_steps)
        self._relaxed = self.constraint.relaxed(self._tightness)
        with self._steadied(active):
            self.last_update = updates.update(
                self.form,
                self._relaxed,
                self._points(active, lambda tensor, rows: updates.dual_sum(self.form, tensor, rows), self._guesses),
                [self.tensors.places[tensor.p] for tensor in active],
                len(tensors),
                step=self.step,
                penalty=self.penalty,
                rescale=self.form.rescale(before, self.penalty),
                span=self.schedule.freeze_step(self.total_steps),
                seed=self._seeds_of(_OF_UPDATES),
            )
        self.phase, self._masked = "admm", len(self.tensors.holding(MASK))

    def _complete(self, tensors: list[ConstrainedTensor], widens: bool = False) -> list[ConstrainedTensor]:
        """Leave out tensors of a set that decides about all its tensors at once where some of these are missing.

        Args:
            tensors: The tensors to choose from.
            widens: Whether missing tensors of such a set are added, if they have a mask.
        """
        everyone, here = list(self.tensors.values()), set(tensors)
        if not here or len(here) == len(everyone):
            return tensors
        for member, indices in self.constraint.members([tensor.name for tensor in everyone]):
            theirs = {everyone[index] for index in indices}
            if member.decides_at_once and here & theirs:
                whole = theirs <= here or (widens and all(t in here or t.has(MASK) for t in theirs))
                here = here | theirs if whole else here - theirs
        return [tensor for tensor in everyone if tensor in here]

    def _measure_stationarity(self) -> None:
        """Measure stationarity, ten times in the ADMM phase, by the gradient of a step that ends with an update."""
        step, end = self.step + 1, self.schedule.freeze_step(self.total_steps)
        done = 0 if self.last_stationarity is None else self.last_stationarity.step
        due = step == end or step * watch.MEASUREMENTS // end > done * watch.MEASUREMENTS // end
        if not due or self.penalty == 0 or not self.schedule.projects_at(step, self.total_steps):
            return
        masked = self.tensors.masked()
        tensors = self._complete(self.tensors.agreed([tensor.p.grad is not None for tensor in masked], masked))
        if tensors:
            with self._steadied(tensors):
                self.last_stationarity = updates.stationarity(
                    self.form, self._target(self.step), tensors, self.importance, self.tensors.processes, step=step,
                    penalty=self.penalty,
                )  # fmt: skip

    def _freeze(self) -> None:
        """Fix the mask, make the zeros exact, and release the split where it is no longer needed."""
        exact.fix(self.constraint, self.tensors.holding(MASK))
        self._begin_frozen("frozen")
        self.hold()

    def _begin_frozen(self, phase: Phase) -> None:
        self.phase, self._waiting = phase, self._without_mask()
        if self._waiting and phase == "frozen":
            self._warn_once(
                f"Elsa: the mask is fixed, and {some([tensor.name for tensor in self._waiting])} had no gradient so "
                f"far, or share units with one that had none: dense until then, they are cut when they get one."
            )
        masked = self.tensors.holding(MASK)
        self._masked, self._copies = len(masked), exact.weight_copies(masked, self.tensors.processes)

    def _without_mask(self) -> list[ConstrainedTensor]:
        masked = self.tensors.masked()
        return [tensor for tensor in self.tensors.values() if tensor not in masked]

    @torch.no_grad()
    def finish(self, resumable: bool = False) -> None:
        """x ← Π_S(x): make the zeros exact.

        Called again, it restores zeros that something has changed since, as :meth:`hold` does, and logs a warning.

        Args:
            resumable: Keep the removed values in the optimizer's state, so that :meth:`resume` can go on as if
                nothing had happened. For runs that end before their last step.
        """
        self.recover()
        if self.finished:
            if moved := self.stray():
                log.warning("Elsa: %d weights off the mask had been moved since finish() and are 0 again.", moved)
            return self.hold()
        if resumable and (self.suspended or self.step == 0):
            return None
        self._check_scalars()
        self.resume()
        said = watch.off_schedule(self.step, self.schedule.freeze_step(self.total_steps), self.total_steps)
        if said is not None and not resumable and self.step > 0:
            self._warn_once(f"Elsa: {said}.")
        elif self.step == 0 and self.total_steps > 1:
            self._warn_once(
                f"Elsa: none of the {self.total_steps} optimizer steps was counted, so what is kept are the largest "
                f"weights as they are. Calls of optimizer.step() with gradients of the constrained weights count; an "
                f"optimizer that is stepped in another way is not seen."
            )
        tensors = list(self.tensors.values())
        fixed = self.tensors.masked() if self.frozen else []
        free = [tensor for tensor in tensors if tensor not in fixed]
        for tensor in fixed:
            self._cut(tensor, None, resumable)
        if free:
            self._project_in_place(free, resumable)
        if resumable:
            self._suspended_from, self.phase = self.phase, "suspended"
        else:
            self._begin_frozen("finished")
            self.hold()
        return None

    def stray(self, values: bool = True) -> int:
        """Return how many entries on this process were changed since the last projection and are no longer in the set.

        It is always 0 while the mask still moves, and for a set that fixes values while the run is suspended.

        Args:
            values: Whether kept weights count that a set which fixes values does not allow. The numbers that its
                groups share change from step to step, so weights of another step differ from these.
        """
        if self.frozen:
            return exact.stray(self.constraint, self.tensors.holding(MASK), self.tensors.places, values)
        if not self.suspended or self.constraint.fixes_values:
            return 0
        return exact.stray_while_suspended(self.tensors.holding(REMOVED), self._zero_off_mask)

    @torch.no_grad()
    def hold(self, values: bool = True) -> None:
        """Restore the zeros if the mask is fixed or the run is suspended, in case something changed the weights.

        Args:
            values: Whether kept weights go back to the values that the set fixes, if it does.
        """
        if self.frozen:
            self._hold(None, {}, values=values)
        elif self.suspended and not self.constraint.fixes_values:
            exact.cut_again(self.tensors.holding(REMOVED), self._zero_off_mask)

    @property
    def _zero_off_mask(self) -> bool:
        """Whether weights off the mask were 0 before :meth:`finish` with ``resumable``, which then removed nothing."""
        return self.form.on_set or self._suspended_from == "frozen"

    def _project_in_place(self, tensors: list[ConstrainedTensor], resumable: bool, stepped: bool = False) -> None:
        packed = updates.decide(self.constraint, self._points(tensors, lambda tensor, rows: tensor.x(rows)))
        for tensor, bits in zip(tensors, packed, strict=True):
            self._cut(tensor, bits, resumable, stepped)

    def recover(self) -> None:
        """Restore the weights from before an optimizer step that raised an exception, if one did."""
        self._weights.undo()
        self._hooks.reset()

    def _cut(
        self, tensor: ConstrainedTensor, packed: Tensor | None, resumable: bool, stepped: bool = False
    ) -> None:  # fmt: skip
        """Zero what a packed mask (None: the tensor's own) does not keep, and bring the rest to the set's values."""
        # state that we add before the optimizer's own breaks its initialisation, and some (SGD) never have any of their
        # own; but a mask that is there already has to become the new one
        keeps = resumable or stepped or tensor.stepped or MASK in tensor.state or self.tensors.flat
        place = self.tensors.places[tensor.p]
        exact.cut(
            self.constraint, tensor, place, packed, self.importance, keeps=keeps, resumable=resumable,
            refits=self._tightness < 1 or self.step == 0,  # at step 0 numbers are at most empty room to load some
        )  # fmt: skip

    @torch.no_grad()
    def resume(self) -> None:
        """Undo ``finish(resumable=True)``, bit for bit; does nothing otherwise."""
        if not self.suspended:
            return
        exact.restore(self.tensors.holding(REMOVED))
        self.phase = self._suspended_from

    # ------------------------------------------------------------------ saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Return the scalars; the tensors are in the optimizer's state."""
        return {
            "step": self.step,
            "penalty": self.penalty,
            "tightness": self._tightness,
            "phase": self.phase,
            "suspended_from": self._suspended_from if self.suspended else self.phase,
            "calls": self._calls,
            "copies": list(self._copies),
            "form": self.form.state_dict(),
            "order": self._names(),
            "total_steps": self.total_steps,
            "settings": self._settings(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scalars, after model and optimizer were loaded.

        If the mask was fixed and the run is longer now, the mask moves again, without the dual of the pruned weights;
        a run that had finished keeps its mask.

        Raises:
            ValueError: The state comes from a run with other settings.
        """
        if "phase" not in state_dict:
            raise UserError("the checkpoint is of an earlier version of elsa_lightning: start from its weights")
        theirs, ours = state_dict["settings"], self._settings()
        different = [key for key in ours if theirs.get(key) != ours[key]]
        if different:
            changes = ", ".join(f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in different)
            raise UserError(
                f"the checkpoint is of a run with other settings ({changes}). Resume with the settings it was made "
                f"with, or start a new run from its weights without resuming"
            )
        if (order := state_dict.get("order", names := self._names())) != names:
            first = next(theirs for theirs, ours in zip(order, names, strict=True) if theirs != ours)
            raise UserError(
                f"the checkpoint has the constrained tensors in another order, from {first} on, and what the form "
                f"measured of each is by its place: give the parameters in the order that they had"
            )
        self.tensors.take_over()
        if state_dict["step"] > 0 and self._lacks_masks(state_dict):
            raise UserError(
                f"the checkpoint counts {state_dict['step']} ADMM steps but the optimizer's state has no masks; load "
                f"the optimizer's state first, from a checkpoint that has it (no save_weights_only)"
            )
        if state_dict["phase"] == "suspended" and state_dict["step"] > 0 and not self.tensors.holding(REMOVED):
            raise UserError(
                "the checkpoint is of a suspended run, and the values that its zeros had were not loaded: what loads "
                "by existing keys, as torch.distributed.checkpoint does, needs admm.expect() before it loads"
            )
        self._hooks.vouch()
        self.step, self.penalty, self._calls = (state_dict[key] for key in ("step", "penalty", "calls"))
        self._tightness = state_dict["tightness"]
        self._relaxed = self.constraint.relaxed(self._tightness)
        self.phase, self._suspended_from = state_dict["phase"], state_dict["suspended_from"]
        self.form.load_state_dict(state_dict["form"], self.tensors.device)
        self.resume()
        if self.frozen:
            self._waiting = self._without_mask()
            self._copies = list(state_dict["copies"])
        self._masked = len(self.tensors.holding(MASK))
        if state_dict["total_steps"] != self.total_steps:
            self._change_length(state_dict["total_steps"])

    def _lacks_masks(self, state_dict: dict[str, Any]) -> bool:
        return not self.tensors.holding(MASK)

    def _check_scalars(self) -> None:
        """Raise ValueError if the optimizer's state was loaded from a run whose scalars were not."""
        if self.phase != "setting up":
            return
        if self._hooks.loaded:
            raise UserError(
                "the optimizer's state that was loaded holds the masks of a run, and the step of its schedule is "
                "missing: save admm.state_dict() beside optimizer.state_dict(), and give it to admm.load_state_dict "
                "after the optimizer's; a new run from these weights takes a new optimizer"
            )
        self._hooks.vouch()

    def _change_length(self, former: int) -> None:
        """Log what another run length changes, and let the mask move again if the schedule now asks for it."""
        end = self.schedule.freeze_step(self.total_steps)
        message = "penalty, ramp and frozen phase follow the new length"
        if self.phase == "finished":
            message = "it had finished, so its mask stays as it is; to open it start a new run from its weights"
        elif self.phase == "frozen" and self.step < end:
            seed = self._seeds_of(_OF_UPDATES)
            exact.reopen(self.form, self.tensors.holding(MASK), lambda tensor: seed(tensor.p))
            self.phase, self._waiting = "admm", []
            message += f", so its mask, which was fixed, is open again until step {end}"
        log.warning(
            "The checkpoint was made in a run of %d steps, this one has %d: %s.", former, self.total_steps, message
        )

    def _names(self) -> list[str]:
        return [tensor.described for tensor in self.tensors.values()]

    def _settings(self) -> dict[str, Any]:
        return {
            "constraint": re.sub(r"np\.\w+\(([^()]*)\)", r"\1", repr(self.constraint)),  # NumPy's numbers as Python's
            "prox": self.prox,
            "state_dtype": self.state_dtype,
            "constrained tensors": sorted(self._names()),
            **asdict(self.schedule),
        }

    def importance(self, tensor: ConstrainedTensor, rows: slice) -> Tensor | None:
        """Return the cost of a squared change of each weight, or None where the optimizer keeps no second moment."""
        moment = tensor.importance(rows)
        if moment is None and (tensor.stepped or tensor.p.grad is not None):
            self._warn_once(
                f"{type(self.optimizer).__name__} keeps no second moment of single weights that can be read (there "
                f"is none, it is in another basis, or factored and sharded), so they are ranked by magnitude alone; an "
                f"Adam makes the projection aware of the loss."
            )
        elif moment is not None and moment.dtype.itemsize == 2:
            self._warn_once(
                f"{type(self.optimizer).__name__} keeps its second moment in {dtype_name(moment.dtype)}, where a step "
                f"of beta2 = 0.999 is lost to rounding and old gradients never fade. Use bitsandbytes' Adam8bit, or "
                f"keep float32 weights (precision bf16-mixed)."
            )
        return self.form.importance(moment, first=self.phase == "setting up")

    def _warn_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning(message)


def take_from_others(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Take parameters from finished ADMMs that constrain some of them; two would undo each other's steps.

    Raises:
        UserError: Another ADMM that constrains some of them has not finished.
    """
    for other in list(_ATTACHED.get(optimizer, ())):
        both = [name for name, p in parameters.items() if p in other.tensors.places]
        if both and not other.finished:
            raise UserError(
                f"{both[0]} is constrained already, by an ADMM of this optimizer that has not finished: call its "
                f"detach(), or make a new optimizer"
            )
        if both:
            other._give_up(set(parameters.values()))
