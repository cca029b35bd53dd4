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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.constraints import Constraint, Point
from elsa_lightning.optimizers import second_moment
from elsa_lightning.penalty import Schedule

log = logging.getLogger(__name__)

Prox = Literal["tracked", "decoupled", "coupled"]

SPLIT = "elsa_split"  # s = z − u, in at least float32
MASK = "elsa_mask"  # True where an entry is kept
REMOVED = "elsa_removed"  # what finish(resumable=True) took off the weights
_KEYS = (SPLIT, MASK, REMOVED)


def check_prox(prox: str) -> Prox:
    """Return ``prox``; raise ValueError if there is no such form."""
    if prox not in get_args(Prox):
        raise ValueError(f"prox must be one of {get_args(Prox)}, got {prox!r}")
    return cast(Prox, prox)


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
      γ = κ · lr/lr_max, as decoupled weight decay does; the second moment stays an estimate of ∇f alone.
    * ``tracked``: decoupled, and z follows x on the mask. For a fixed support the augmented Lagrangian is
      minimised over z by z = x + u there, so the penalty acts off the mask only.

    Args:
        optimizer: Any torch optimizer. One without a second moment is projected by magnitude.
        parameters: What to constrain, by name; see :func:`elsa_lightning.selection.select`.
        constraint: The set S.
        total_steps: Optimizer steps of the whole run.
        schedule: The course of penalty, sparsity, projections and frozen phase.
        prox: The form of the x-update.

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
        prox: Prox = "tracked",
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be 1 or more optimizer steps, got {total_steps}")
        if not parameters:
            raise ValueError("parameters is empty: there is nothing to constrain")
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in parameters.items():
            constraint.check(name, p.shape)
            if id(p) not in trained:
                raise ValueError(
                    f"{name} is constrained but {type(optimizer).__name__} does not train it; give the optimizer that "
                    f"does, or leave the parameter out"
                )
        self.optimizer = optimizer
        self.parameters = dict(parameters)
        self.constraint = constraint
        self.total_steps = total_steps
        self.schedule = schedule or Schedule()
        self.prox = check_prox(prox)
        self.step = 0
        self.penalty = 0.0
        self.finished = False
        self.last_update: Update | None = None
        self._depth = 0
        self._told = False
        self._stash: dict[int, dict[str, Any]] = {}
        # bitsandbytes loads state by itself and casts what is not named here
        if hasattr(optimizer, "non_castable_tensor_keys"):
            optimizer.non_castable_tensor_keys |= set(_KEYS)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def detach(self) -> None:
        """Take the hooks off the optimizer; its state stays."""
        for handle in self._handles:
            handle.remove()

    @property
    def frozen(self) -> bool:
        """Whether the mask is fixed and the zeros are exact after every step."""
        states = [self.optimizer.state.get(p, {}) for p in self.parameters.values()]
        return any(MASK in state for state in states) and not any(SPLIT in state for state in states)

    def _active(self) -> dict[str, nn.Parameter]:
        """Return the parameters the optimizer has stepped.

        The others wait for their first gradient: state put in before it breaks an optimizer's own set-up.
        """
        return {name: p for name, p in self.parameters.items() if self.optimizer.state.get(p) or p.grad is not None}

    @property
    def suspended(self) -> bool:
        """Whether :meth:`finish` left the means to go on."""
        return any(REMOVED in self.optimizer.state.get(p, {}) for p in self.parameters.values())

    def masks(self) -> dict[str, Tensor]:
        """Return the current masks by parameter name, True where kept; empty before the first step."""
        states = {name: self.optimizer.state.get(p, {}) for name, p in self.parameters.items()}
        return {name: state[MASK] for name, state in states.items() if MASK in state}

    # ------------------------------------------------------------------ inside the optimizer's step

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Add the proximal gradient once the gradients of this step are final.

        With a closure (Lightning's automatic optimisation) they are final when it returns, after accumulation
        and clipping; without one they already are.
        """
        self._depth += 1
        if self._depth > 1:  # a subclass whose step calls its parent's fires the hooks twice
            return None
        args = list(args)
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_proximal_gradient()
            return None

        def wrapped() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._depth = 0  # the post-hook will not run
                raise
            self._add_proximal_gradient()
            return loss

        if len(args) > 1:
            args[1] = wrapped
            return tuple(args), kwargs
        return tuple(args), {**kwargs, "closure": wrapped}

    @torch.no_grad()
    def _add_proximal_gradient(self) -> None:
        """g ← g + λ (x − s)."""
        if self.prox != "coupled" or self.frozen or self.penalty == 0:
            return
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimizer under GradScaler unscales by itself
        for p in self.parameters.values():
            state = self.optimizer.state.get(p)
            if p.grad is None or not state or SPLIT not in state:
                continue
            pull = p - state[SPLIT]
            p.grad.add_(pull if scale is None else pull * scale, alpha=self.penalty)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or not self._stepped():
            return
        self.step += 1
        if self.frozen:
            for name, mask in self.masks().items():
                self.parameters[name].mul_(mask)
            return
        if self.prox != "coupled" and self.penalty > 0 and self.step > 1:
            self._apply_prox()
        if self.schedule.projects_at(self.step, self.total_steps):
            self._update()
        if self.schedule.frozen > 0 and self.step >= self.schedule.freeze_step(self.total_steps):
            self._freeze()

    def _stepped(self) -> bool:
        """Say whether the optimizer really stepped: a skipped batch or an overflow fires the hooks too."""
        overflow = getattr(self.optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return False
        return any(p.grad is not None for p in self.parameters.values())

    def _apply_prox(self) -> None:
        """x ← (x + γ s)/(1 + γ), off the mask only when z tracks x."""
        # looked up at every step: loading an optimizer's state replaces its groups
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for p in self.parameters.values():
            state, group = self.optimizer.state.get(p, {}), groups[id(p)]
            if SPLIT not in state:
                continue
            peak = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
            gamma = self.penalty * float(group["lr"]) / peak if peak else 0.0
            pull = state[SPLIT] - p
            if self.prox == "tracked":
                pull.masked_fill_(state[MASK], 0)
            p.add_(pull, alpha=gamma / (1 + gamma))

    # ------------------------------------------------------------------ projections

    def _dual_sum(self, p: nn.Parameter) -> Tensor:
        """v = x + u, with u = 0 on the mask and −s off it."""
        x = p.detach().to(torch.promote_types(p.dtype, torch.float32))
        state = self.optimizer.state.get(p, {})
        return x - state[SPLIT].masked_fill(state[MASK], 0) if SPLIT in state else x

    def _update(self) -> None:
        """z ← Π_S(v); u ← v − z, rescaled to the new penalty; s ← z − u; and what a user watches."""
        before, self.penalty = self.penalty, self.schedule.penalty_at(self.step, self.total_steps)
        rescale = before / self.penalty if self.penalty > 0 else 0.0  # u = y/λ for the true multiplier y
        target = self.constraint.relaxed(self.schedule.tightness_at(self.step, self.total_steps))
        active = self._active()
        masks = target.project(_Points(self, active, self._dual_sum))
        sums: list[Tensor] = []
        for p, mask in zip(active.values(), masks, strict=True):
            state, v = self.optimizer.state[p], self._dual_sum(p)
            x, z = p.to(v.dtype), v.masked_fill(~mask, 0)
            former = state.get(MASK, torch.ones_like(mask))
            z_before = (x if self.prox == "tracked" or SPLIT not in state else state[SPLIT]).masked_fill(~former, 0)
            sums.append(
                torch.stack(
                    [(x - z).square().sum(), x.square().sum(), (z - z_before).square().sum(),
                     (mask ^ former).sum().to(v.dtype), mask.sum().to(v.dtype)]
                ).double()
            )  # fmt: skip
            state[SPLIT] = torch.where(mask, v, v * -rescale)
            state[MASK] = mask
        device = sums[0].device
        gap, norm, moved, flips, kept = torch.stack([s.to(device) for s in sums]).sum(dim=0)
        entries = sum(p.numel() for p in active.values())
        self.last_update = Update(
            step=self.step,
            penalty=self.penalty,
            sparsity=1 - kept / entries,
            primal_residual=(gap / norm).sqrt(),
            dual_residual=self.penalty * moved.sqrt(),
            mask_flips=flips / entries,
        )

    def _freeze(self) -> None:
        """Fix the mask, make the zeros exact, and release the split."""
        for name, mask in self.masks().items():
            p = self.parameters[name]
            p.masked_fill_(~mask, 0)
            del self.optimizer.state[p][SPLIT]

    @torch.no_grad()
    def finish(self, resumable: bool = False) -> None:
        """x ← Π_S(x): make the zeros exact.

        Args:
            resumable: Keep what is removed in the optimizer's state, so that :meth:`resume` goes on as if
                nothing had happened. For runs that end before their last step.
        """
        if self.finished or self.suspended or (resumable and self.step == 0):
            return
        fixed = self.masks() if self.frozen else {}
        free = {name: p for name, p in self.parameters.items() if name not in fixed}
        projected = self.constraint.project(_Points(self, free, lambda p: p.detach()))
        for name, mask in chain(fixed.items(), zip(free, projected, strict=True)):
            p = self.parameters[name]
            state = self.optimizer.state[p]
            if resumable:
                state[REMOVED] = p.masked_fill(mask, 0)
            else:
                state[MASK] = mask
                state.pop(SPLIT, None)
            p.masked_fill_(~mask, 0)
        self.finished = not resumable

    @torch.no_grad()
    def resume(self) -> None:
        """Undo ``finish(resumable=True)``, bit for bit; does nothing otherwise."""
        for p in self.parameters.values():
            removed = self.optimizer.state.get(p, {}).pop(REMOVED, None)
            if removed is not None:
                p.copy_(torch.where(removed != 0, removed, p))

    # ------------------------------------------------------------------ saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Return the scalars; the tensors are in the optimizer's state."""
        return {
            "step": self.step,
            "penalty": self.penalty,
            "finished": self.finished,
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
        if state_dict["step"] > 0 and not self.masks():
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
        self.resume()

    def _settings(self) -> dict[str, Any]:
        names = sorted(f"{name}{tuple(p.shape)}" for name, p in self.parameters.items())
        return {
            "constraint": repr(self.constraint),
            "prox": self.prox,
            "constrained tensors": names,
            **asdict(self.schedule),
        }

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Set our tensors aside: torch would cast them to the parameter's dtype."""
        states = {index: dict(state) for index, state in state_dict["state"].items()}
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._stash = {
            id(p): {key: states[index].pop(key) for key in _KEYS if key in states[index]}
            for index, p in zip(indices, parameters, strict=False)
            if index in states
        }
        return {**state_dict, "state": states}

    def _after_load(self, optimizer: Optimizer) -> None:
        for p in self.parameters.values():
            ours = self._stash.get(id(p))
            if ours:
                optimizer.state[p].update({key: value.to(p.device, copy=True) for key, value in ours.items()})
        self._stash = {}

    def importance(self, p: nn.Parameter) -> Tensor | None:
        """Return F̂ of a parameter, or None (said once) where the optimizer keeps no second moment."""
        moment = second_moment(self.optimizer, p)
        if moment is None and not self._told and self.optimizer.state.get(p) is not None:
            self._told = True
            log.warning(
                "%s keeps no second moment, so weights are ranked by magnitude alone; an Adam makes the projection "
                "aware of the loss.", type(self.optimizer).__name__,
            )  # fmt: skip
        return moment


class _Points:
    """The points to project, made one at a time at each iteration."""

    def __init__(
        self, admm: ADMM, parameters: Mapping[str, nn.Parameter], value: Callable[[nn.Parameter], Tensor]
    ) -> None:
        self.admm, self.parameters, self.value = admm, parameters, value

    def __iter__(self) -> Iterator[Point]:
        for name, p in self.parameters.items():
            yield Point(name, self.value(p), self.admm.importance(p))
