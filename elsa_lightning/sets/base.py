"""The interface of a set, and of the points in which it sees the weights.

A set S decides about all constrained tensors together. It sees them as *points*, v = x + u, some rows at a time,
wherever their entries are stored. It says which entries stay and, if their values are not free, what these become.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from elsa_lightning.errors import UserError
from elsa_lightning.layout.lowbit import masked
from elsa_lightning.layout.rows import Piece, Rows
from elsa_lightning.layout.sharded import Part, whole


@dataclass(frozen=True)
class Point:
    """Some rows of a tensor that is projected.

    Attributes:
        v: x + u, ``(rows, in)``: rows of one matrix, or some matrices of a stack below each other.
        importance: F̂ in the shape of ``v``, or None where the optimizer keeps no second moment.
        tensor: Index of the tensor among the points.
        name: Name of the tensor.
        piece: Which rows of the local part these are.
        layout: Where the rows lie in the whole tensor.
        numbers: The numbers that :meth:`Constraint.fit` chose for these rows at the last update, or None.
        dtype: The dtype of the weights in which z is stored; None for that of ``v``.
        stack: Indices of the tensors whose matrices are stacked here, if several are: see :meth:`Points.stacked`.
    """

    v: Tensor
    importance: Tensor | None
    tensor: int
    name: str
    piece: Piece
    layout: Rows
    numbers: Tensor | None = None
    dtype: torch.dtype | None = None
    stack: Sequence[int] = ()

    @property
    def transposed(self) -> bool:
        """Whether the weights are stored ``(in, out)``, as by GPT-2's Conv1D."""
        return self.layout.transposed

    @property
    def part(self) -> Part:
        """The part of the tensor that this process holds."""
        return self.layout.part

    def place(self, axis: int) -> Tensor:
        """Return the indices of the entries along an axis of the whole tensor; see :meth:`Rows.index`."""
        return self.layout.index(self.piece.rows, axis)


class Points(ABC):
    """The points of the constrained tensors; each iteration computes the local ones anew, some rows at a time.

    Their values do not change until the set has decided, so it may iterate as often and in any order as it likes.

    Attributes:
        names: Names of the tensors.
        shapes: Shapes of the whole tensors, ``(out, in)`` or ``(experts, out, in)``.
        transposed: Whether each is stored ``(in, out)``.
        parts: Largest number of parts that a tensor is sharded into.
        device: The device of the entries.
        guesses: Thresholds of the last projection, which save :func:`elsa_lightning.sets.threshold.largest` a pass;
            None if thresholds are not carried over.
        unweighted: Whether it is known that a tensor has no importance.
    """

    guesses: dict[Hashable, Tensor] | None = None
    unweighted: bool = False
    names: Sequence[str]
    shapes: Sequence[torch.Size]
    transposed: Sequence[bool]
    parts: int = 1
    device: torch.device

    @abstractmethod
    def __iter__(self) -> Iterator[Point]:
        """Yield the local rows, tensor by tensor."""

    def stacked(self) -> Iterator[Point]:
        """Yield the local rows once, with small matrices of one shape as a stack; the order is always the same."""
        return iter(self)

    @abstractmethod
    def only(self, indices: Sequence[int]) -> Points:
        """Return some of the tensors."""

    def holding(self, matrices: Collection[int] | None, starts: Sequence[int]) -> tuple[Points, Sequence[int]]:
        """Return the tensors that hold some matrices, and the index of the first matrix of each.

        Args:
            matrices: Indices of the matrices among those of all tensors; None for all.
            starts: Index of the first matrix of each tensor here.
        """
        if matrices is None:
            return self, starts
        tensors = sorted({bisect(starts, matrix) - 1 for matrix in matrices})
        return self.only(tensors), [starts[tensor] for tensor in tensors]

    def add(self, t: Tensor) -> Tensor:
        """Return the sum of ``t`` over all processes."""
        return t


class WholePoints(Points):
    """Points of whole tensors, all held by one process.

    Args:
        tensors: v and F̂ (or None) of each.
        names: Names of the tensors; None numbers them.
        transposed: Whether they are stored ``(in, out)``; None for none.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[Tensor, Tensor | None]],
        names: Sequence[str] | None = None,
        transposed: Sequence[bool] | None = None,
    ) -> None:
        self.tensors = tensors
        self.names = names or [str(index) for index in range(len(tensors))]
        self.shapes = [v.shape for v, _ in tensors]
        self.transposed = transposed or [False] * len(tensors)
        self.device = tensors[0][0].device
        self.unweighted = any(importance is None for _, importance in tensors)

    def __iter__(self) -> Iterator[Point]:
        """Yield each tensor as one point."""
        for index, (v, importance) in enumerate(self.tensors):
            layout = Rows(whole(v), v, transposed=self.transposed[index])
            piece = Piece(slice(0, layout.count), 0, math.prod(v.shape[:-2]))
            rows = None if importance is None else importance.flatten(0, -2)
            yield Point(v.flatten(0, -2), rows, index, self.names[index], piece, layout)

    def only(self, indices: Sequence[int]) -> WholePoints:
        """Return some of the tensors."""
        chosen = ([of[i] for i in indices] for of in (self.tensors, self.names, self.transposed))
        return WholePoints(*chosen)  # type: ignore[arg-type]


class Constraint(ABC):
    """A set S over all constrained tensors together: an immutable value, which YAML can build.

    A new set is a frozen dataclass with these methods; ``docs/architecture.md`` has the smallest one.

    Attributes:
        grain: Size, rows × columns of ``(out, in)``, of the blocks that no piece and no shard may cut; 0 for all rows
            or columns. For weights that are stored transposed, rows and columns are swapped.
        fixes_values: Whether kept entries can take only certain values, so that :meth:`values` changes them.
        inertia: τ of a proximal term τ ‖z − z_before‖² in the projection: entries that were cut are ranked as if they
            were 1 + τ times smaller. For sets where exchanging entries costs much and gains little.
        stacks: Whether :meth:`support` yields masks in the order of :meth:`Points.stacked` instead of the points'.
        decides_at_once: Whether the set decides about all its tensors or none, so that a run waits until each of them
            has had a gradient.
    """

    grain: tuple[int, int] = (1, 1)
    fixes_values: bool = False
    inertia: float = 0.0
    stacks: bool = False
    decides_at_once: bool = False

    def check(self, shapes: Mapping[str, torch.Size], transposed: Collection[str] = ()) -> None:
        """Raise UserError, naming the tensor, if tensors of these names and shapes cannot be in the set.

        Args:
            shapes: Shapes of the whole tensors, by name.
            transposed: Names of the tensors that are stored ``(in, out)``.
        """
        for name, shape in shapes.items():
            if len(shape) not in (2, 3):
                raise UserError(
                    f"{name} has shape {tuple(shape)}; a constrained tensor is a matrix or a stack of matrices (or a "
                    f"convolution's kernels, sharded along their first dimension if at all): leave it out of targets"
                )

    def grain_of(self, name: str) -> tuple[int, int]:
        """Return the grain of a tensor; override this where it is not the same for all."""
        return self.grain

    def shared(self, name: str) -> tuple[int, int] | None:
        """Return the size, rows × columns of ``(out, in)``, of the groups that share a number of :meth:`fit`, or None.

        They divide the grain and the tensor; 0 stands for all rows or columns. For weights that are stored transposed,
        rows and columns are swapped. None means that the set chooses no numbers.
        """
        return None

    def covers(self, name: str) -> bool:
        """Return whether the set can put zeros into a tensor of this name; other tensors are left alone."""
        return True

    def fitted(self, model: nn.Module) -> Self:
        """Return the set with what it has to know about a model; called once, before training.

        Raises:
            UserError: The set is not possible for this model.
        """
        return self

    def sized(self, shapes: Mapping[str, torch.Size], bytes_each: Mapping[str, float] | None = None) -> Self:
        """Return the set with absolute numbers, such as a budget of weights, resolved for these tensors.

        Args:
            shapes: Shapes of the whole tensors, by name.
            bytes_each: Bytes of one entry of each tensor; None for 4.
        """
        return self

    def members(self, names: Sequence[str]) -> list[tuple[Constraint, list[int]]]:
        """Return the independent sets that this one consists of, each with the indices of its tensors."""
        return [(self, list(range(len(names))))]

    def relaxed(self, tightness: float) -> Self:
        """Return the looser set of a ramp: its first set at ``tightness`` 0, this set at 1."""
        return self

    @abstractmethod
    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the mask of each point in order, True where Π_S keeps an entry, with the point's number of entries.

        ``points`` may be read in any order and any number of times, but equally often on every process.
        """

    def fit(self, v: Tensor, point: Point) -> Tensor:
        """Choose the number of each group of entries (see :meth:`shared`), which holds until the next update.

        Args:
            v: ``(rows, in)`` of the point, 0 off the mask.
            point: The rows, with their importance and, after an update, their last numbers: chosen by this set or by a
                looser one, or 0.

        Returns:
            ``(rows of groups, columns of groups)``, exact in bfloat16.
        """
        raise NotImplementedError

    def values(self, v: Tensor, point: Point) -> Tensor:
        """Return the values that kept entries take; entries that have such a value already stay the same.

        Args:
            v: ``(rows, in)`` of the point, 0 off the mask.
            point: The rows, with their numbers if they have some.
        """
        return v

    def resolution(self, point: Point) -> Tensor | None:
        """Return the distance of neighbouring values of each entry, in the shape of the point; None if unknown."""
        return None


def parts(constraint: object) -> Iterator[object]:
    """Yield a set and, recursively, the sets that it assigns by pattern, or that its grid is inside of."""
    yield constraint
    if isinstance(inside := getattr(constraint, "inside", None), Constraint):
        yield from parts(inside)
    inner = getattr(constraint, "sets", None)
    for each in inner.values() if isinstance(inner, Mapping) else ():
        yield from parts(each)


def check_set(value: object, name: str) -> None:
    """Raise UserError unless a value is a set.

    Args:
        value: The value.
        name: Name of the argument, for the message.
    """
    if not isinstance(value, Constraint):
        raise UserError(f"{name} must be a set, such as NM(2, 4) or Unstructured(0.9), got {value!r}")


def weighted(v: Tensor, importance: Tensor | None) -> Tensor:
    """Return √F v in float32, with the sign of v; v itself if it is float32 and there is no importance."""
    return v.float() if importance is None else (importance.sqrt() * v).float()


def distance(v: Tensor, importance: Tensor | None) -> Tensor:
    """Return √F |v| in float32: its square, which could overflow or underflow, is the cost of zeroing an entry."""
    signed = weighted(v, importance)
    return signed.abs() if importance is None else signed.abs_()


def project(constraint: Constraint, v: Tensor, mask: Tensor, point: Point) -> Tensor:
    """Return z: v on the mask, rounded to the set's values if it fixes them, and 0 off the mask."""
    z = masked(v, mask)
    if not constraint.fixes_values:
        return z
    z = z.to(torch.promote_types(v.dtype, torch.float32))
    if point.numbers is None and constraint.shared(point.name) is not None:
        point = replace(point, numbers=constraint.fit(z, point))
    z = masked(constraint.values(z, point), mask)
    return z.to(v.dtype if point.dtype is None else point.dtype).to(v.dtype)  # rounded to the weights' dtype
