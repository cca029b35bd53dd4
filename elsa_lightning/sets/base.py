"""What a set is, and how it sees the weights.

A set S decides on all constrained tensors together. It is shown them as *points*, v = x + u, some rows at a time,
wherever their entries are; it says which entries stay, and what values they take where these are not free.
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
    """Some rows of what is projected.

    Attributes:
        v: x + u, ``(rows, in)``: rows of one matrix, or some matrices of a stack below each other.
        importance: F̂ of the shape of ``v``, or None where the optimizer keeps no second moment.
        tensor: Index of the tensor among the points.
        name: Of the tensor.
        piece: Which rows these are.
        layout: Where they lie in the whole.
        numbers: What :meth:`Constraint.fit` chose for these rows at the last update, or None.
        dtype: Of the weights that z is stored in; None for that of ``v``.
        stack: Indices of the tensors whose matrices these are, where there are several: see :meth:`Points.stacked`.
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
        """Which part of the tensor this process holds."""
        return self.layout.part

    def place(self, axis: int) -> Tensor:
        """Return where entries lie along an axis of the whole; see :meth:`Rows.index`."""
        return self.layout.index(self.piece.rows, axis)


class Points(ABC):
    """The constrained tensors, wherever their entries are; iterating makes the local ones anew, some rows at a time.

    They stay as they are until the set has decided, however often and in whatever order it looks at them.

    Attributes:
        names: Of the tensors.
        shapes: Of the whole tensors, ``(out, in)`` or ``(experts, out, in)``.
        transposed: Whether they are stored ``(in, out)``.
        parts: Largest number of parts that a tensor is sharded into.
        device: Where the entries are.
        guesses: Thresholds of the last projection, which save :func:`elsa_lightning.sets.threshold.largest` a pass;
            None where there is none before.
    """

    guesses: dict[Hashable, Tensor] | None = None
    names: Sequence[str]
    shapes: Sequence[torch.Size]
    transposed: Sequence[bool]
    parts: int = 1
    device: torch.device

    @abstractmethod
    def __iter__(self) -> Iterator[Point]:
        """Yield the local rows, tensor by tensor."""

    def stacked(self) -> Iterator[Point]:
        """Yield the local rows once, those of small matrices of one shape as a stack, in an order that stays."""
        return iter(self)

    @abstractmethod
    def only(self, indices: Sequence[int]) -> Points:
        """Return some of the tensors."""

    def holding(self, matrices: Collection[int] | None, starts: Sequence[int]) -> tuple[Points, Sequence[int]]:
        """Return the tensors that hold some matrices, and the index of the first matrix of each.

        Args:
            matrices: Their indices among the matrices of all tensors; None for all.
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
    """Tensors that one process holds.

    Args:
        tensors: v and F̂ (or None) of each.
        names: Of the tensors; None numbers them.
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

    def __iter__(self) -> Iterator[Point]:
        """Yield each tensor at once."""
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
    """A set S over all constrained tensors together: a value, which YAML can build.

    A new set is a frozen dataclass with these methods; ``docs/architecture.md`` has the smallest one.

    Attributes:
        grain: Rows × columns of ``(out, in)``, from each multiple on, that no piece and no shard may cut; 0 for all
            there are. Of weights that are stored transposed it is turned.
        fixes_values: Whether kept entries cannot take any value, so that :meth:`values` changes them.
        inertia: τ of a proximal term τ ‖z − z_before‖² in the projection: what was cut is chosen as if it were 1 + τ
            times smaller. For sets where an exchange costs much beside what it gains.
        stacks: Whether :meth:`support` yields masks of :meth:`Points.stacked`, not of the points in their order.
        decides_at_once: Whether it decides about all its tensors or about none, so that a run waits until each of them
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
            shapes: Of the whole tensors, by name.
            transposed: Names of those that are stored ``(in, out)``.
        """
        for name, shape in shapes.items():
            if len(shape) not in (2, 3):
                raise UserError(
                    f"{name} has shape {tuple(shape)}; a constrained tensor is a matrix or a stack of matrices (or a "
                    f"convolution's kernels, sharded along their first dimension if at all): leave it out of targets"
                )

    def grain_of(self, name: str) -> tuple[int, int]:
        """Return the grain of a tensor, where it is not the same for all."""
        return self.grain

    def shared(self, name: str) -> tuple[int, int] | None:
        """Return of which rows × columns of ``(out, in)`` :meth:`fit` chooses one number, or None if it has none.

        They divide the grain, and the tensor; 0 for all there are. Of transposed weights they are turned.
        """
        return None

    def covers(self, name: str) -> bool:
        """Say whether a tensor of this name can ever have zeros in this set; one that cannot is left alone."""
        return True

    def fitted(self, model: nn.Module) -> Self:
        """Return the set with what it must know of a model; asked once, before training.

        Raises:
            UserError: The set cannot be had of this model.
        """
        return self

    def sized(self, shapes: Mapping[str, torch.Size], bytes_each: Mapping[str, float] | None = None) -> Self:
        """Return the set for tensors of these names and shapes, where it is said in absolute numbers.

        Args:
            shapes: Of the whole tensors, by name.
            bytes_each: Of one entry of each; None for 4.
        """
        return self

    def members(self, names: Sequence[str]) -> list[tuple[Constraint, list[int]]]:
        """Return the sets it is made of, each with the indices of its tensors, where these decide by themselves."""
        return [(self, list(range(len(names))))]

    def relaxed(self, tightness: float) -> Self:
        """Return the looser set on the way to this one, where a ramp begins at 0; this set at 1."""
        return self

    @abstractmethod
    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield which entries of each point Π_S keeps, in order, True where kept, with the point's number of entries.

        ``points`` may be read in any order and as often as need be; every process does so equally often.
        """

    def fit(self, v: Tensor, point: Point) -> Tensor:
        """Return the number of each group of entries (see :meth:`shared`) that holds until the next update.

        Args:
            v: ``(rows, in)`` of the point, with 0 where nothing is kept.
            point: Which rows these are, their importance, and their last numbers if there was an update before: of
                this set, or of a looser one, or 0.

        Returns:
            ``(rows of groups, columns of groups)``, exact in bfloat16.
        """
        raise NotImplementedError

    def values(self, v: Tensor, point: Point) -> Tensor:
        """Return what kept entries become; of its own values it changes none.

        Args:
            v: ``(rows, in)`` of the point, with 0 where nothing is kept.
            point: Which rows these are, and their numbers where they have some.
        """
        return v

    def resolution(self, point: Point) -> Tensor | None:
        """Return how far apart the values of each entry are, in the shape of the point; None if unknown."""
        return None


def parts(constraint: object) -> Iterator[object]:
    """Yield a set and those that it is made of by pattern, and theirs."""
    yield constraint
    inner = getattr(constraint, "sets", None)
    for each in inner.values() if isinstance(inner, Mapping) else ():
        yield from parts(each)


def check_set(value: object, name: str) -> None:
    """Raise UserError unless a value is a set.

    Args:
        value: What was given.
        name: Of the argument.
    """
    if not isinstance(value, Constraint):
        raise UserError(f"{name} must be a set, such as NM(2, 4) or Unstructured(0.9), got {value!r}")


def weighted(v: Tensor, importance: Tensor | None) -> Tensor:
    """Return √F v in float32, with the sign of v; v itself where there is no importance and it is float32."""
    return v.float() if importance is None else (importance.sqrt() * v).float()


def distance(v: Tensor, importance: Tensor | None) -> Tensor:
    """Return √F |v| in float32, whose square is what zeroing each entry costs; it has the range of v."""
    signed = weighted(v, importance)
    return signed.abs() if importance is None else signed.abs_()


def project(constraint: Constraint, v: Tensor, mask: Tensor, point: Point) -> Tensor:
    """Return z: v on the mask, brought to the set's values where it fixes them, and 0 off it."""
    z = masked(v, mask)
    if not constraint.fixes_values:
        return z
    z = z.to(torch.promote_types(v.dtype, torch.float32))
    if point.numbers is None and constraint.shared(point.name) is not None:
        point = replace(point, numbers=constraint.fit(z, point))
    z = masked(constraint.values(z, point), mask)
    return z.to(v.dtype if point.dtype is None else point.dtype).to(v.dtype)  # as the weights can hold it
