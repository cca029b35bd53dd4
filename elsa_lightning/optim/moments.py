"""Reads the second moment, F̂, from the state of any known optimizer, and a few other facts about optimizers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from elsa_lightning.layout.kernels import rows_of
from elsa_lightning.layout.sharded import local

_ROTATED = {"GG", "Q", "QL", "QR"}  # SOAP and Shampoo: their moments are of the gradient in another basis
# keys of: Adam and its kin in torch, bitsandbytes with two states, RMSprop and Adadelta, Adagrad, Adafactor's vectors
_KEPT = ("max_exp_avg_sq", "exp_avg_sq", "state2", "square_avg", "sum", "variance")
_FACTORS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))  # torch's Adafactor; transformers'
BNB_BLOCK = 256  # entries that share a scale in bitsandbytes


def second_moment(optimizer: Optimizer, p: nn.Parameter, rows: slice | None = None) -> Tensor | None:
    """Return the diagonal empirical Fisher estimate F̂ of this process's part of a parameter, or None.

    F̂ is the square of what the optimizer's own step divides by: a running mean of squared gradients (the Adam family,
    RMSprop, Adadelta) or with amsgrad its largest value so far, their sum (Adagrad), the product of their means over
    rows and columns (Adafactor, where nothing is sharded) or the square of their running maximum (Adamax). bitsandbytes
    and torchao keep it in 8 or 4 bits.
    A factor per tensor, such as the bias correction, changes no ranking within it. Moments of the gradient in another
    basis than the weights' (SOAP) say nothing about single weights.

    Args:
        optimizer: Any optimizer.
        p: One of its parameters.
        rows: Return only these rows ``(rows, n)`` of the matrices below each other, or these entries ``(1, n)`` of a
            flat slice; None for all, in the shape of the part, kernels as a matrix.
    """
    state, x = optimizer.state.get(p, {}), rows_of(p, local(p))
    if _ROTATED & state.keys():
        return None
    for row, column in _FACTORS:
        if isinstance(state.get(row), Tensor) and isinstance(state.get(column), Tensor):
            if x.dim() == local(p).dim():
                return _product(state[row], state[column], x, rows)
            whole = _product(state[row], state[column], local(p), None)  # kernels, factored over their last two axes
            return None if whole is None else _rows_of(rows_of(p, _laid_out(whole, p)), x, rows)
    if isinstance(largest := state.get("exp_inf"), Tensor):
        return None if largest.shape != p.shape else _rows_of(rows_of(p, _laid_out(largest, p)), x, rows).square()
    name = next((key for key in _KEPT if isinstance(state.get(key), Tensor)), None)
    if name is None and getattr(optimizer, "optimizer_name", None) in ("adagrad", "rmsprop"):  # bitsandbytes'
        name = "state1"
    if name is None or name not in state or (name == "sum" and not _has_stepped(state)):
        return None
    moment = rows_of(p, _laid_out(state[name], p))
    if moment.shape[:-1] != x.shape[:-1] or moment.shape[-1] < x.shape[-1]:
        return None
    if hasattr(moment, "block_size"):
        return _of_blocks(moment, moment.block_size, rows, lambda first, last: _torchao_blocks(moment, first, last))
    if not moment.is_floating_point():
        index = name.removeprefix("state")
        scales, table = local(state[f"absmax{index}"]).flatten(), state[f"qmap{index}"].to(moment.device)
        numbers = _of_blocks(
            moment, BNB_BLOCK, rows, lambda first, last: _bnb_blocks(moment, scales, table, first, last)
        )
        return numbers[..., : numbers.shape[-1] if rows is not None and x.dim() == 1 else x.shape[-1]]
    return _rows_of(moment, x, rows)


def _laid_out(moment: Tensor, p: nn.Parameter) -> Tensor:
    """Return a moment in the memory format of the weights, copied if its format differs."""
    x, moment = local(p), local(moment)
    if type(moment) is not Tensor or moment.shape != x.shape or moment.stride() == x.stride():
        return moment
    return torch.empty_like(x, dtype=moment.dtype).copy_(moment)


def _has_stepped(state: dict[str, Any]) -> bool:
    """Return whether an optimizer with state from the start (Adagrad) has stepped; True if its counter is on a GPU."""
    step = state.get("step", 1)
    return bool(step != 0) if not isinstance(step, Tensor) or step.device.type == "cpu" else True


def _rows_of(moment: Tensor, x: Tensor, rows: slice | None) -> Tensor:
    """Return rows of a moment without padding beyond the length of the weights' rows."""
    if rows is None:
        return moment[..., : x.shape[-1]]
    return moment[None, rows] if x.dim() == 1 else moment.reshape(-1, moment.shape[-1])[rows, : x.shape[-1]]


def _product(row: Tensor, column: Tensor, x: Tensor, rows: slice | None) -> Tensor | None:
    """Return the moment that Adafactor stores as means over columns and rows, for each matrix of a stack."""
    if isinstance(row, DTensor) or x.dim() < 2:  # the mean over all rows would need those of other processes
        return None
    if row.dim() == x.dim():
        row, column = row.squeeze(-1), column.squeeze(-2)
    if row.shape != x.shape[:-1] or column.shape != (*x.shape[:-2], x.shape[-1]):
        return None
    row = row / row.mean(dim=-1, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
    if rows is None:
        return row[..., None] * column[..., None, :]
    matrix = torch.arange(rows.start, rows.stop, device=row.device) // row.shape[-1]
    return row.flatten()[rows, None] * column.reshape(-1, column.shape[-1])[matrix]


def _of_blocks(kept: Tensor, block: int, rows: slice | None, blocks: Callable[[int, int], Tensor]) -> Tensor:
    """Return the dequantized numbers of some rows; blocks follow the flattened order, so rows may share one."""
    n = kept.shape[-1]
    start, stop = (0, kept.numel()) if rows is None else (rows.start * n, rows.stop * n)
    if rows is not None and kept.dim() == 1:
        n = rows.stop - rows.start
        start, stop = rows.start, rows.stop
    first, last = start // block, -(-stop // block)
    before = start - first * block
    return blocks(first, last)[before : before + stop - start].view(kept.shape if rows is None else (-1, n))


def _bnb_blocks(codes: Tensor, scales: Tensor, table: Tensor, first: int, last: int) -> Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    block = codes.flatten()[first * BNB_BLOCK : last * BNB_BLOCK]
    numbers: Tensor = dequantize_blockwise(block, absmax=scales[first:last], code=table, blocksize=BNB_BLOCK)
    return numbers


def _torchao_blocks(kept: Any, first: int, last: int) -> Tensor:
    """Dequantize some blocks of a torchao tensor, by making a smaller tensor of its class of them."""
    names, context = kept.__tensor_flatten__()
    tensors = {name: getattr(kept, name) for name in names}
    bytes_a_block = kept.codes.numel() // kept.scale.numel()
    tensors["codes"] = kept.codes.flatten()[first * bytes_a_block : last * bytes_a_block]
    tensors["scale"] = kept.scale[first:last]
    shape = ((last - first) * kept.block_size,)
    context = [shape if isinstance(value, (tuple, list)) else value for value in context]  # 4 bits: a shape
    numbers: Tensor = type(kept).__tensor_unflatten__(tensors, context).dequantize()
    return numbers.flatten()


def lays_out_anew(optimizer: Optimizer) -> bool:
    """Return whether an optimizer makes weights contiguous in its step, as those of bitsandbytes do."""
    update = getattr(type(optimizer), "update_step", None)
    return getattr(update, "__module__", "").startswith("bitsandbytes")


def rate_of(group: dict[str, Any]) -> float:
    """Return the learning rate of a parameter group; 1 if it has none, as with relative steps."""
    rate = group.get("lr")
    return 1.0 if rate is None else float(rate)


def set_up(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> None:
    """Make an optimizer create its state of some parameters, by a step on zero gradients with learning rate 0."""
    if optimizer.state:
        return
    chosen = set(parameters)
    rates = [group.get("lr") for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p in chosen else None
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None:
            group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
