"""Block sparsity: whole blocks of a matrix are zero, which block-sparse kernels skip."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from elsa_lightning.sets.base import Constraint, Point, Points, distance
from elsa_lightning.sets.checks import check_fraction, check_whole
from elsa_lightning.sets.threshold import Scores, largest
from elsa_lightning.sets.unstructured import AT_ONCE


@dataclass(frozen=True)
class Block(Constraint):
    """A share of the blocks of each matrix may be non-zero; blocks at its edges may be smaller.

    The projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over such z: it keeps the blocks with the largest Σ Fᵢ vᵢ², unchanged.
    Ties go to the upper, then to the left block.

    Args:
        sparsity: Fraction of zero blocks in each matrix, 0 ≤ sparsity < 1. At least one block survives.
        rows: Outputs in a block.
        columns: Inputs in a block.

    Raises:
        UserError: A value is out of range.
    """

    sparsity: float
    rows: int = 16
    columns: int = 16

    def __post_init__(self) -> None:
        check_fraction("sparsity", self.sparsity, "a fraction of zero blocks")
        check_whole("rows", self.rows, "how many outputs a block has")
        check_whole("columns", self.columns, "how many inputs a block has")

    def grain_of(self, name: str) -> tuple[int, int]:
        """Return the size of a block."""
        return (self.rows, self.columns)

    def relaxed(self, tightness: float) -> Block:
        """Return the set with a share of zeros that grows from 70 %, or less if the target is less, to the target."""
        start = min(self.sparsity, AT_ONCE)
        return replace(self, sparsity=start + (self.sparsity - start) * tightness)

    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the masks of the blocks that survive."""
        stacks = [math.prod(shape[:-2]) for shape in points.shapes]
        starts = [sum(stacks[:index]) for index in range(len(stacks))]
        kept = []
        for shape, stack, turned in zip(points.shapes, stacks, points.transposed, strict=True):
            rows, columns = self._shape(turned)
            count = -(-shape[-2] // rows) * -(-shape[-1] // columns)
            kept += [max(1, count - round(self.sparsity * count))] * stack

        def scores(matrices: Collection[int] | None) -> Iterator[Scores]:
            of, firsts = points.holding(matrices, starts)
            for point in of:
                first = firsts[point.tensor] + point.piece.matrix
                score = self._score(point)
                yield Scores(score, score, first, point.part.counts, point.part.order)

        ranks = torch.tensor(kept, device=points.device)
        masks = largest(scores, torch.arange(len(kept), device=points.device), ranks, points.add, points.parts)
        for point, blocks in zip(points, masks, strict=False):
            rows, columns = self._shape(point.transposed)
            matrices, n = point.piece.matrices, point.v.shape[-1]
            height = point.v.shape[0] // matrices
            grid = blocks.view(matrices, -(-height // rows), -(-n // columns))
            whole = grid.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
            yield whole[:, :height, :n].reshape(point.v.shape)
        next(masks, None)

    def _shape(self, transposed: bool) -> tuple[int, int]:
        return (self.columns, self.rows) if transposed else (self.rows, self.columns)

    def _score(self, point: Point) -> Tensor:
        """Return Σ F v² of each block, float32 ``(matrices, blocks)``."""
        rows, columns = self._shape(point.transposed)
        matrices, n = point.piece.matrices, point.v.shape[-1]
        cost = distance(point.v, point.importance).square().reshape(matrices, -1, n)
        height = cost.shape[1]
        cost = pad(cost, (0, -n % columns, 0, -height % rows))
        blocks = cost.view(matrices, -(-height // rows), rows, -(-n // columns), columns)
        return blocks.sum(dim=(2, 4)).flatten(1)
