"""An optimizer's state as FSDP1 can save it: of its parameters' shape, in one dtype, the same names for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.layout.sharded import Part, local
from elsa_lightning.layout.tensors import KEYS, MASK, REMOVED, SPLIT, ConstrainedTensor

_DENSE = (SPLIT, MASK, REMOVED)
_NO_MASK = -1.0


def as_dense(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    constrained: Mapping[nn.Parameter, ConstrainedTensor],
    parts: Mapping[nn.Parameter, Part],
) -> dict[str, Any]:
    """Return an optimizer's state dict with one number an entry, for every parameter that lies in flat slices.

    Args:
        optimizer: Whose it is.
        state_dict: What the optimizer returned.
        constrained: Its constrained tensors.
        parts: Where its parameters' parts lie.
    """
    keys = [key for key in _DENSE if any(tensor.has(key) for tensor in constrained.values())]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    theirs: dict[str, Any] = next((s for s in state_dict["state"].values() if s.keys() - set(KEYS)), {})
    states = dict(state_dict["state"])
    for index, p in zip(indices, parameters, strict=True):
        if parts[p].start is None:
            continue
        states.pop(index, None)
        if p.numel() == 0:
            continue
        wide = torch.promote_types(p.dtype, torch.float32)
        state = {key: value for key, value in state_dict["state"].get(index, {}).items() if key not in KEYS}
        if not state and p.requires_grad:  # without a gradient so far
            state = {key: _nothing(value, p, wide) for key, value in theirs.items() if key not in KEYS}
        if not state:
            continue
        dense = constrained[p].dense() if p in constrained else {}
        for key in keys:
            state[key] = dense.get(key, torch.full_like(p.detach(), _NO_MASK if key == MASK else 0, dtype=wide))
        states[index] = {
            key: value.to(wide) if isinstance(value, Tensor) and value.dim() else value for key, value in state.items()
        }
    return {**state_dict, "state": states}


def take_dense(optimizer: Optimizer, constrained: Mapping[nn.Parameter, ConstrainedTensor]) -> None:
    """Turn loaded state that :func:`as_dense` wrote into that of the constrained tensors, whatever their layout is.

    Args:
        optimizer: Which has loaded it.
        constrained: Its constrained tensors.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if MASK not in state or not state[MASK].is_floating_point():
                continue
            dense = {key: local(state.pop(key)) for key in _DENSE if key in state}
            if bool((dense[MASK] < 0).any()):  # not constrained, or without a mask so far
                dense = {key: dense[key] for key in dense.keys() & {REMOVED}}
            if p in constrained:
                constrained[p].take_dense(dense)
            if float(state.get("step", 1)) == 0:  # it stood for a parameter without gradient
                for key in state.keys() - set(KEYS):
                    del state[key]


def _nothing(like: Any, p: Tensor, wide: torch.dtype) -> Any:
    """Return the state of a parameter that was never stepped, in place of what others have."""
    if isinstance(like, Tensor) and like.dim():
        return torch.zeros_like(p, dtype=wide)
    return torch.zeros_like(like) if isinstance(like, Tensor) else 0
