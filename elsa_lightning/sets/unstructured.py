"""Single entries: a number of them, in each tensor or in all together, may be non-zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.layout.sharded import exact_dtype
from elsa_lightning.sets.base import Constraint, Points, distance
from elsa_lightning.sets.threshold import Scores, largest

AT_ONCE = 0.7  # sparsity that a ramp begins with: so much is cut by the first projection, and may return


@dataclass(frozen=True)
class Unstructured(Constraint):
    """(1 − sparsity) · n entries that may be non-zero, to the nearest.

    Its projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over z with so many non-zeros: it keeps the largest Fᵢ vᵢ², unchanged.
    Equal ones go to the larger magnitude, then to the lower index, so that exactly so many survive.

    Args:
        sparsity: Fraction of zeros, 0 ≤ sparsity < 1. At least one entry survives.
        scope: ``tensor``: the fraction holds in each tensor of n entries (in each expert of a fused tensor).
            ``model``: in all of them together; tensors share the budget by F̂ v² relative to the tensor's mean.

    Raises:
        ValueError: A value is out of range.
    """

    sparsity: float
    scope: Literal["tensor", "model"] = "tensor"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            hint = f"; for {self.sparsity:g} % give {self.sparsity / 100:g}" if 1 < self.sparsity < 100 else ""
            raise UserError(f"sparsity must be a fraction of zeros in [0, 1), got {self.sparsity}{hint}")
        if self.scope not in ("tensor", "model"):
            raise UserError(f"scope must be 'tensor' or 'model', got {self.scope!r}")

    def relaxed(self, tightness: float) -> Unstructured:
        """Return the set on the way from ``AT_ONCE``, or all of the sparsity if that is less, to this one."""
        start = min(self.sparsity, AT_ONCE)
        return replace(self, sparsity=start + (self.sparsity - start) * tightness)

    def kept(self, entries: int) -> int:
        """Return how many of so many entries survive."""
        return max(1, entries - round(self.sparsity * entries))

    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the masks of the largest entries, by F̂ v²."""
        stacks = [math.prod(shape[:-2]) for shape in points.shapes]
        starts = [sum(stacks[:index]) for index in range(len(stacks))]
        sizes = [
            shape[-2] * shape[-1] for shape, stack in zip(points.shapes, stacks, strict=True) for _ in range(stack)
        ]
        pools, kept = list(range(len(sizes))), [self.kept(size) for size in sizes]
        scales = None
        if self.scope == "model":
            pools, kept, scales = [0] * len(sizes), [self.kept(sum(sizes))], _scales(points)

        def scores() -> Iterator[Scores]:
            for point in points:
                score = distance(point.v, point.importance)
                if scales is not None:
                    score = score / scales[point.tensor]
                shape = (point.piece.matrices, point.v.numel() // point.piece.matrices)
                first = starts[point.tensor] + point.piece.matrix
                magnitude = point.v.abs().float().reshape(shape)
                yield Scores(score.reshape(shape), magnitude, first, point.part.counts, point.part.order)

        ranks = torch.tensor(kept, device=points.device)
        yield from largest(scores, torch.tensor(pools, device=points.device), ranks, points.add, points.parts)


def _scales(points: Points) -> Tensor:
    """Return the root of the mean of F̂ v² of each tensor, float32 ``(tensors,)``."""
    squares = torch.zeros(len(points.shapes), dtype=exact_dtype(points.device), device=points.device)
    for point in points:
        if point.part.counts:
            squares[point.tensor] += distance(point.v, point.importance).to(squares.dtype).square().sum()
    sizes = torch.tensor([shape.numel() for shape in points.shapes], device=points.device)
    return (points.add(squares) / sizes).sqrt().float().clamp_min(torch.finfo(torch.float32).tiny)
