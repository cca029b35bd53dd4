"""Other people's optimizers: the second moment they keep, and steps that bfloat16 weights do not lose."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.layout.lowbit import round_to_bfloat16
from elsa_lightning.layout.sharded import local

BNB_BLOCK = 256  # entries that share a scale in bitsandbytes


def second_moment(optimizer: Optimizer, p: nn.Parameter, rows: slice | None = None) -> Tensor | None:
    """Return the diagonal empirical Fisher estimate F̂ of this process's part of a parameter, or None.

    torch's Adam family keeps it as ``exp_avg_sq``, bitsandbytes as ``state2``, in 8 bits for large tensors.
    The bias correction is a constant per tensor and changes no ranking within it.

    Args:
        optimizer: Any.
        p: One of its parameters.
        rows: Only these rows ``(rows, n)`` of the matrices below each other, or these entries ``(1, n)`` of a flat
            slice; None for all, in the shape of the part.
    """
    state = optimizer.state.get(p, {})
    kept = state.get("exp_avg_sq", state.get("state2"))
    if not isinstance(kept, Tensor):
        return None
    moment, x = local(kept), local(p)
    if moment.shape[:-1] != x.shape[:-1] or moment.shape[-1] < x.shape[-1]:
        return None
    n = x.shape[-1]
    if rows is not None and x.dim() == 1:
        n = rows.stop - rows.start
    if not moment.is_floating_point():
        moment = _dequantized(moment, local(state["absmax2"]), state["qmap2"], rows)
    elif rows is not None:
        moment = moment[None, rows] if x.dim() == 1 else moment.reshape(-1, moment.shape[-1])[rows]
    return moment[..., :n]


def _dequantized(codes: Tensor, scales: Tensor, table: Tensor, rows: slice | None) -> Tensor:
    """Return the numbers of some rows; blocks run through rows, or along them where a row is whole blocks."""
    from bitsandbytes.functional import dequantize_blockwise

    n = codes.shape[-1]
    start, stop = (0, codes.numel()) if rows is None else (rows.start * n, rows.stop * n)
    if rows is not None and codes.dim() == 1:
        n = rows.stop - rows.start
        start, stop = rows.start, rows.stop
    first, last = start // BNB_BLOCK, -(-stop // BNB_BLOCK)
    block = codes.flatten()[first * BNB_BLOCK : last * BNB_BLOCK]
    numbers: Tensor = dequantize_blockwise(
        block, absmax=scales.flatten()[first:last], code=table.to(codes.device), blocksize=BNB_BLOCK
    )
    before = start - first * BNB_BLOCK
    return numbers[before : before + stop - start].view(codes.shape if rows is None else (-1, n))


def set_up(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:
    """Let an optimizer create its state of some parameters by a step on zero gradients that moves nothing."""
    if optimizer.state:
        return
    chosen = set(parameters)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p in chosen else None
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


_ALIKE = {"Adagrad", "Adam", "Adamax", "AdamW", "Lion", "NAdam", "RAdam", "RMSprop", "SGD"}


def moves_alike_everywhere(optimizer: Optimizer) -> bool:
    """Say whether a step depends on the gradients alone and not on where the weights are.

    So it is for Adam and its kin, torch's or bitsandbytes', without weight decay.
    """
    kinds = {re.sub(r"^Paged|(8|32)bit$", "", kind.__name__) for kind in type(optimizer).__mro__}
    return bool(kinds & _ALIKE) and not any(group.get("weight_decay") for group in optimizer.param_groups)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


class WeightRounding:
    """Rounds bfloat16 weights stochastically, whatever optimizer trains them.

    To nearest, every step below half a unit of a weight's last place is lost. So the optimizer steps from 0, where
    bfloat16 holds its step to 3 digits, and the step is added to the weights in float32 and rounded up or down at
    random, exact in the mean. That takes a copy of the weights while the optimizer steps, and an optimizer whose
    step does not depend on where the weights are.
    """

    def __init__(self) -> None:
        self._before: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def set_aside(self, optimizer: Optimizer) -> str | None:
        """Zero the bfloat16 weights about to be stepped; return what to warn of where that cannot be done."""
        half = (torch.bfloat16, torch.float16)
        low = [p for group in optimizer.param_groups for p in group["params"] if p.dtype in half]
        if not low:
            return None
        if low[0].dtype != torch.bfloat16 or not moves_alike_everywhere(optimizer):
            return (
                f"The weights are {dtype_name(low[0].dtype)}, and steps of {type(optimizer).__name__} that are small "
                f"beside them are lost to rounding. Use bfloat16 weights with an Adam or SGD without weight_decay, or "
                f"keep float32 weights (precision bf16-mixed)."
            )
        for p in low:
            if p.grad is not None:
                x = local(p)
                self._before[p] = x.clone()
                x.zero_()
        return None

    @torch.no_grad()
    def put_back(self, noise: Callable[[nn.Parameter], Tensor]) -> None:
        """Add the steps to the weights; ``noise`` makes random int32 of the shape of a parameter's part."""
        for p, before in self._before.items():
            x = local(p)
            x.copy_(round_to_bfloat16(before.float() + x, noise(p)))
        self._before = {}

    @torch.no_grad()
    def undo(self) -> None:
        """Return to the weights before a step that was interrupted."""
        for p, before in self._before.items():
            local(p).copy_(before)
        self._before = {}
