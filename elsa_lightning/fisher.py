"""F̂ of a few batches, held towards the product of its row and column means.

The square of one batch's gradient says little about a single weight, and the first projection, which cuts most, rests
on it. But a linear layer's gradient is a sum of products δ xᵀ, so its expected squares are nearly a product of what
belongs to the rows (δ) and to the columns (x), and these means are of thousands of entries each. So after n batches

    F̂ᵢⱼ ← (n F̂ᵢⱼ + n₀ Rᵢ Cⱼ / M) / (n + n₀),        R, C, M the means over rows, columns and all entries,

as if n₀ batches had been seen that agree with the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_lightning.layout.sharded import Processes, exact_dtype, sent
from elsa_lightning.stacks import together
from elsa_lightning.tensors import ConstrainedTensor, Factors

_LEAST = 0.05  # a smaller share is not worth a pass


def share_of(prior: float, batches: int) -> float:
    """Return n₀ / (n + n₀), or 0 where that is so small that F̂ stays as it is."""
    share = prior / (prior + batches)
    return share if share >= _LEAST else 0.0


@contextmanager
def steadied(tensors: Sequence[ConstrainedTensor], processes: Processes, share: float) -> Iterator[None]:
    """Let the tensors' F̂ be held towards the product of means.

    Args:
        tensors: The tensors; every process gives the same.
        processes: The processes that hold them.
        share: The weight of the product, as :func:`share_of` returns it; 0 leaves F̂ as it is.
    """
    try:
        if share > 0:
            _measure(tensors, processes, share)
        yield
    finally:
        for tensor in tensors:
            tensor.factors = None


def _measure(tensors: Sequence[ConstrainedTensor], processes: Processes, share: float) -> None:
    """Set the tensors' factors; all processes' sums are added at once."""
    device, shapes = tensors[0].p.device, [tensor.part.shape for tensor in tensors]
    heights, widths = [math.prod(shape[:-1]) for shape in shapes], [shape[-1] for shape in shapes]
    sums = torch.zeros(sum(heights + widths), dtype=exact_dtype(device), device=device)
    of_rows, of_columns = torch.split(sums, [sum(heights), sum(widths)])
    rows, columns = torch.split(of_rows, heights), torch.split(of_columns, widths)
    for indices, tensor in together(enumerate(tensors)):
        if tensor.part.counts and len(indices) == 1:
            _add(tensor, rows[indices[0]], columns[indices[0]])
        elif tensor.part.counts:
            _add_stack(tensor, [rows[index] for index in indices], [columns[index] for index in indices])
    processes.add(sums)
    height, width = sent([heights, widths], device)
    total = torch.stack(torch._foreach_norm(rows, 1))  # no sum is negative
    empty = (total == 0).to(total.dtype)
    high, full, none = (torch.repeat_interleave(t, height, output_size=len(of_rows)) for t in (height, total, empty))
    r = torch.split(((of_rows * high + none) / (full + none)).float(), heights)
    high, none = (torch.repeat_interleave(t, width, output_size=len(of_columns)) for t in (height, empty))
    c = torch.split((of_columns / high + none).float(), widths)
    for tensor, of_its_rows, of_its_columns in zip(tensors, r, c, strict=True):
        tensor.factors = Factors(of_its_rows[None], of_its_columns[None], share)


def _add(tensor: ConstrainedTensor, rows: Tensor, columns: Tensor) -> None:
    """Add the sums of F̂ over rows and over columns of this process's part."""
    width = tensor.part.shape[-1]
    for piece in tensor.pieces():
        if (moment := tensor.moment(piece.rows)) is None:
            return
        if (start := tensor.part.start) is None:
            row, column = tensor.layout.row_index(piece.rows), tensor.layout.index(piece.rows, 1)
        else:  # entries in the order of the flattened whole, completed to rows
            first = start + piece.rows.start
            before, row_count = first % width, -(-(first % width + moment.numel()) // width)
            moment = F.pad(moment.flatten(), (before, row_count * width - before - moment.numel())).view(-1, width)
            row = torch.arange(row_count, device=moment.device) + first // width
            column = torch.arange(width, device=moment.device)
        rows.index_add_(0, row.flatten(), moment.sum(dim=1, dtype=rows.dtype))
        columns.index_add_(0, column.flatten(), moment.sum(dim=0, dtype=rows.dtype))


def _add_stack(stack: ConstrainedTensor, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    """Add those of each member of a stack, with as many operations as for one tensor."""
    if (moment := stack.moment(slice(None))) is None:
        return
    *_, height, width = stack.layout.shape
    row, column = stack.part.offsets[-2:]
    moment = moment.view(len(rows), height, width)
    by_row, by_column = (moment.sum(dim=dim, dtype=rows[0].dtype).unbind() for dim in (2, 1))
    torch._foreach_add_([of[row : row + height] for of in rows], by_row)
    torch._foreach_add_([of[column : column + width] for of in columns], by_column)
