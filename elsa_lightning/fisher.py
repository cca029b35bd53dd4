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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_lightning.layout.rows import Rows
from elsa_lightning.layout.sharded import Processes, exact_dtype
from elsa_lightning.tensors import ConstrainedTensor

_LEAST = 0.05  # a smaller share is not worth a pass


class Factors(NamedTuple):
    """What one tensor's F̂ is held towards.

    Attributes:
        rows: R/M of all rows of the whole tensor; 1 where all F̂ are 0.
        columns: C of all columns; likewise.
        share: n₀ / (n + n₀).
    """

    rows: Tensor
    columns: Tensor
    share: float

    def hold(self, moment: Tensor, layout: Rows, rows: slice) -> Tensor:
        """Return rows of F̂, held towards the product."""
        product = self.rows[_below_each_other(layout, rows)] * self.columns[layout.index(rows, 1)]
        dtype = torch.promote_types(moment.dtype, product.dtype)
        return torch.lerp(moment.to(dtype), product.to(dtype), self.share).to(moment.dtype)


def _below_each_other(layout: Rows, rows: slice) -> Tensor:
    """Return the indices of rows among those of all matrices of the whole tensor."""
    return layout.index(rows, 2) * layout.part.shape[-2] + layout.index(rows, 0)


@contextmanager
def steadied(tensors: Sequence[ConstrainedTensor], processes: Processes, share: float) -> Iterator[None]:
    """Let the tensors' F̂ be held towards the product of means.

    Args:
        tensors: The tensors; every process gives the same.
        processes: The processes that hold them.
        share: n₀ / (n + n₀).
    """
    try:
        if share >= _LEAST:
            _measure(tensors, processes, share)
        yield
    finally:
        for tensor in tensors:
            tensor.factors = None


def _measure(tensors: Sequence[ConstrainedTensor], processes: Processes, share: float) -> None:
    """Set the tensors' factors; all processes' sums are added at once."""
    sizes = [(math.prod(tensor.part.shape[:-1]), tensor.part.shape[-1]) for tensor in tensors]
    device = tensors[0].p.device
    sums = torch.zeros(sum(map(sum, sizes)), dtype=exact_dtype(device), device=device)
    parts = list(zip(*[iter(torch.split(sums, [size for pair in sizes for size in pair]))] * 2, strict=True))
    for tensor, (rows, columns) in zip(tensors, parts, strict=True):
        if tensor.part.counts:
            _add(tensor, rows, columns)
    processes.add(sums)
    for tensor, (rows, columns), (height, width) in zip(tensors, parts, sizes, strict=True):
        total = rows.sum()
        some = total > 0
        mean = torch.where(some, total, 1) / (height * width)
        found = torch.where(some, rows / width / mean, 1), torch.where(some, columns / height, 1)
        tensor.factors = Factors(found[0].float(), found[1].float(), share)


def _add(tensor: ConstrainedTensor, rows: Tensor, columns: Tensor) -> None:
    """Add the sums of F̂ over rows and over columns of this process's part."""
    width = tensor.part.shape[-1]
    for piece in tensor.pieces():
        if (moment := tensor.importance(piece.rows)) is None:
            return
        if (start := tensor.part.start) is None:
            row, column = _below_each_other(tensor.layout, piece.rows), tensor.layout.index(piece.rows, 1)
        else:  # entries in the order of the flattened whole, completed to rows
            first = start + piece.rows.start
            before, row_count = first % width, -(-(first % width + moment.numel()) // width)
            moment = F.pad(moment.flatten(), (before, row_count * width - before - moment.numel())).view(-1, width)
            row = torch.arange(row_count, device=rows.device) + first // width
            column = torch.arange(width, device=rows.device)
        rows.index_add_(0, row.flatten(), moment.sum(dim=1, dtype=rows.dtype))
        columns.index_add_(0, column.flatten(), moment.sum(dim=0, dtype=rows.dtype))
