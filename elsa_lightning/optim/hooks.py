"""Hooks on any optimizer: between the final gradients and the step, after the step, and when its state is loaded."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

_KNOWN: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()  # whether vouch() was called


def innermost(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside a wrapper of accelerate, Fabric or Lightning: its hooks are those that fire."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer) and inner is not optimizer:
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, or one that wraps it, got {type(optimizer).__name__}")
    return optimizer


class StepHooks:
    """Calls back at every step of an optimizer, whoever calls it, and preserves our state's dtypes when it is loaded.

    Args:
        optimizer: Any torch optimizer.
        keys: Keys of our tensors in its state.
        before: Called when the gradients of a step are final, with the loss if there is one. With a closure
            (Lightning's automatic optimisation) that is when the closure returns, after accumulation and clipping.
        after: Called after the step.
        interrupted: Called if a step raised: at once with ``catches``, else before the next step.
        catches: Whether to wrap ``optimizer.step``, the only way to notice at once that a step raises.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        keys: Collection[str],
        before: Callable[[Any], None],
        after: Callable[[], None],
        interrupted: Callable[[], None],
        catches: bool = False,
    ) -> None:
        self.keys, self.before, self.after, self.interrupted = keys, before, after, interrupted
        self._steps: list[FrameType] = []  # callers of the current, maybe nested, steps, outermost first
        self._stash: dict[nn.Parameter, dict[str, Any]] = {}
        if optimizer not in _KNOWN:  # never removed: state may be loaded between two runs
            optimizer.register_load_state_dict_post_hook(_forget)
            _KNOWN[optimizer] = False
        # bitsandbytes has its own loading, which casts tensors that are not named here
        if hasattr(optimizer, "non_castable_tensor_keys"):
            optimizer.non_castable_tensor_keys |= set(keys)
        self._optimizer = optimizer
        untraced: Any = torch.compiler.disable  # a compiled optimizer step would recompile at every step of ours
        self._handles = [
            optimizer.register_step_pre_hook(untraced(self._before_step)),
            optimizer.register_step_post_hook(untraced(self._after_step)),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        self._catching: Any = self._catch(optimizer) if catches else None

    @property
    def loaded(self) -> bool:
        """Whether the state has tensors of ours that were loaded, maybe before attaching, and not vouched for."""
        known = _KNOWN[self._optimizer]
        return not known and any(key in state for state in self._optimizer.state.values() for key in self.keys)

    def vouch(self) -> None:
        """Declare that the state now belongs to a run of this process, or to one that it resumes."""
        _KNOWN[self._optimizer] = True

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        if self._catching is not None and vars(self._optimizer).get("step") is self._catching:
            vars(self._optimizer).pop("step")  # if it was wrapped again it stays, and only passes through
            if self._former is not None:
                vars(self._optimizer)["step"] = self._former
        self._catching = None

    def _catch(self, optimizer: Optimizer) -> Any:
        """Wrap the step of one optimizer, as learning-rate schedules do, and return the wrapper."""
        inner, self._former = optimizer.step, vars(optimizer).get("step")

        @functools.wraps(inner)  # copies the mark by which a schedule recognises a step that it has wrapped
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            except BaseException:
                if self._catching is not None:
                    self.reset()
                    self.interrupted()
                raise

        optimizer.step = method = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        return method

    def reset(self) -> None:
        """Forget an interrupted step."""
        self._steps.clear()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        caller = _caller()
        if self._steps and not _is_inside(caller, self._steps[0]):  # that step raised, so its post-hook never ran
            self.reset()
            self.interrupted()
        self._steps.append(caller)
        if len(self._steps) > 1:  # a subclass whose step calls its parent's fires the hooks twice
            return None
        args = list(args)
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):  # some optimizers take a loss there
            self._prepare(closure)
            return None

        def wrapped() -> Any:
            try:
                loss = closure()
            except BaseException:
                self.reset()  # the post-hook will not run
                raise
            self._prepare(loss)
            return loss

        if len(args) > 1:
            args[1] = wrapped
            return tuple(args), kwargs
        return tuple(args), {**kwargs, "closure": wrapped}

    def _prepare(self, loss: Any) -> None:
        try:
            self.before(loss)
        except BaseException:
            self.reset()
            raise

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._steps:
            self._steps.pop()
        if not self._steps:
            self.after()

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Set our tensors aside, because torch would cast them to the parameter's dtype."""
        states = {index: dict(state) for index, state in state_dict["state"].items()}
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._stash = {
            p: {key: states[index].pop(key) for key in self.keys if key in states[index]}
            for index, p in zip(indices, parameters, strict=False)
            if index in states
        }
        return {**state_dict, "state": states}

    def _after_load(self, optimizer: Optimizer) -> None:
        for p, ours in self._stash.items():
            if ours:
                optimizer.state[p].update({key: value.to(p.device, copy=True) for key, value in ours.items()})
        self._stash = {}


def _forget(optimizer: Optimizer) -> None:
    _KNOWN[optimizer] = False


def _caller() -> FrameType:
    """Return the frame that called a hook, skipping those of torch.compiler.disable, which wraps it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
        frame = frame.f_back
    return frame


def _is_inside(frame: FrameType | None, outer: FrameType) -> bool:
    """Return whether a call was made within another one that still runs."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer
