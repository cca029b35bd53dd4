"""The second moment that other people's optimizers keep."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.layout.kernels import rows_of
from elsa_lightning.layout.sharded import local

_ROTATED = {"GG", "Q", "QL", "QR"}  # SOAP and Shampoo: their moments are of the gradient in another basis
BNB_BLOCK = 256  # entries that share a scale in bitsandbytes


def second_moment(optimizer: Optimizer, p: nn.Parameter, rows: slice | None = None) -> Tensor | None:
    """Return the diagonal empirical Fisher estimate F̂ of this process's part of a parameter, or None.

    torch's Adam family keeps it as ``exp_avg_sq``, bitsandbytes as ``state2``, in 8 bits for large tensors.
    The bias correction is a constant per tensor and changes no ranking within it. Moments of the gradient in another
    basis than the weights' (SOAP) say nothing about single weights.

    Args:
        optimizer: Any.
        p: One of its parameters.
        rows: Only these rows ``(rows, n)`` of the matrices below each other, or these entries ``(1, n)`` of a flat
            slice; None for all, in the shape of the part, kernels as a matrix.
    """
    state = optimizer.state.get(p, {})
    kept = state.get("exp_avg_sq", state.get("state2"))
    if not isinstance(kept, Tensor) or _ROTATED & state.keys():
        return None
    moment, x = rows_of(p, local(kept)), rows_of(p, local(p))
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


def lays_out_anew(optimizer: Optimizer) -> bool:
    """Say whether an optimizer makes weights contiguous at its step, as bitsandbytes' do."""
    update = getattr(type(optimizer), "update_step", None)
    return getattr(update, "__module__", "").startswith("bitsandbytes")


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


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
