"""The sets S that weights are constrained to: values that YAML can build."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elsa_lightning.layout.sharded import Part, whole
from elsa_lightning.sets.projections import distance
from elsa_lightning.sets.threshold import Scores, largest

AT_ONCE = 0.7  # sparsity that a ramp begins with: so much is cut by the first projection, and may return


class Point(NamedTuple):
    """Some rows of what is projected, at their current place.

    Attributes:
        v: x + u, ``(rows, in)``: rows of one matrix, or some matrices of a stack below each other.
        importance: F̂ of the shape of ``v``, or None where the optimizer keeps no second moment.
        tensor: Index of the tensor among all.
        matrix: Index of the first matrix in its stack.
        matrices: How many matrices the rows are of.
        part: Which part of the tensor this process holds.
    """

    v: Tensor
    importance: Tensor | None
    tensor: int
    matrix: int
    matrices: int
    part: Part


class Points(ABC):
    """The constrained tensors, wherever their entries are; iterating makes the local ones anew, some rows at a time.

    Attributes:
        shapes: Of the whole tensors, ``(out, in)`` or ``(experts, out, in)``.
        parts: Largest number of parts that a tensor is sharded into.
        device: Where the entries are.
    """

    shapes: Sequence[torch.Size]
    parts: int = 1
    device: torch.device

    @abstractmethod
    def __iter__(self) -> Iterator[Point]:
        """Yield the local rows, tensor by tensor."""

    def add(self, t: Tensor) -> Tensor:
        """Return the sum of ``t`` over all processes."""
        return t


class WholePoints(Points):
    """Tensors that one process holds.

    Args:
        tensors: v and F̂ (or None) of each.
    """

    def __init__(self, tensors: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self.tensors = tensors
        self.shapes = [v.shape for v, _ in tensors]
        self.device = tensors[0][0].device

    def __iter__(self) -> Iterator[Point]:
        """Yield each tensor at once."""
        for index, (v, importance) in enumerate(self.tensors):
            rows = None if importance is None else importance.flatten(0, -2)
            yield Point(v.flatten(0, -2), rows, index, 0, math.prod(v.shape[:-2]), whole(v))


class Constraint(ABC):
    """A set S over all constrained tensors together.

    A new set is a frozen dataclass with these methods and a function in ``projections``.
    """

    @abstractmethod
    def relaxed(self, tightness: float) -> Constraint:
        """Return the looser set on the way to this one: where a ramp begins at 0, this set at 1."""

    @abstractmethod
    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ValueError if a tensor of this shape cannot be in the set."""

    @abstractmethod
    def project(self, points: Points) -> Iterator[Tensor]:
        """Yield the mask of Π_S of each point, in order and with the point's number of entries in their order.

        ``points`` may be iterated more than once; every process does so equally often.
        """


@dataclass(frozen=True)
class Unstructured(Constraint):
    """(1 − sparsity) · n entries that may be non-zero, to the nearest.

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
            raise ValueError(f"sparsity must be a fraction of zeros in [0, 1), got {self.sparsity}{hint}")
        if self.scope not in ("tensor", "model"):
            raise ValueError(f"scope must be 'tensor' or 'model', got {self.scope!r}")

    def relaxed(self, tightness: float) -> Unstructured:
        """Return the set on the way from ``AT_ONCE``, or all of the sparsity if that is less, to this one."""
        start = min(self.sparsity, AT_ONCE)
        return replace(self, sparsity=start + (self.sparsity - start) * tightness)

    def check(self, name: str, shape: torch.Size) -> None:
        """Raise ValueError unless the tensor is a matrix, or a stack of them."""
        if len(shape) not in (2, 3):
            raise ValueError(
                f"{name} has shape {tuple(shape)}; a constrained tensor is a matrix or a stack of matrices, which a "
                f"convolution's kernels are not: leave it out of targets"
            )

    def kept(self, entries: int) -> int:
        """Return how many of so many entries survive."""
        return max(1, entries - round(self.sparsity * entries))

    def project(self, points: Points) -> Iterator[Tensor]:
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
                shape = (point.matrices, point.v.numel() // point.matrices)
                first = starts[point.tensor] + point.matrix
                magnitude = point.v.abs().float().reshape(shape)
                yield Scores(score.reshape(shape), magnitude, first, point.part.counts, point.part.order)

        ranks = torch.tensor(kept, device=points.device)
        yield from largest(scores, torch.tensor(pools, device=points.device), ranks, points.add, points.parts)


def _scales(points: Points) -> Tensor:
    """Return the root of the mean of F̂ v² of each tensor, float32 ``(tensors,)``."""
    squares = torch.zeros(len(points.shapes), dtype=torch.float64, device=points.device)
    for point in points:
        if point.part.counts:
            squares[point.tensor] += distance(point.v, point.importance).double().square().sum()
    sizes = torch.tensor([shape.numel() for shape in points.shapes], device=points.device)
    return (points.add(squares) / sizes).sqrt().float().clamp_min(torch.finfo(torch.float32).tiny)
