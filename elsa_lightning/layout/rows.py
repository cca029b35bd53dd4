"""A process's part of a matrix, or of a stack of matrices, as rows below each other, processed some rows at a time.

Large tensors are processed in pieces of rows, so that temporary tensors stay small. This is the layout of tensors that
are whole or sharded as DTensors; :class:`elsa_lightning.layout.fsdp1.FlatSlice` is that of FSDP1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from elsa_lightning.layout.kernels import as_kernel, as_matrix
from elsa_lightning.layout.sharded import Part, Places, local

PIECE = 1 << 24  # entries processed at once: enough to keep a device busy
PIECE_ON_CPU = 1 << 18  # as many as its cache holds
SMALL = 1 << 20  # up to so many entries, launching an operation takes longer than copying them into a stack and back
SMALL_ON_CPU = 1 << 15
STACK = 1 << 22  # largest stack, in entries: larger ones save few further launches, but cost the copies

HOSTS = {"cpu"}  # device types on which operations branch, and whose results the host has without synchronizing


def is_host(device: torch.device) -> bool:
    """Return whether a device is the host: which operations are fast there and which on a GPU differs."""
    return device.type in HOSTS


def on_host(t: Tensor) -> bool:
    """Return whether a tensor is on the host."""
    return is_host(t.device)


class Piece(NamedTuple):
    """Some rows of one matrix, or of some whole matrices of a stack; in a flat slice ``rows`` counts entries.

    Attributes:
        rows: The rows of the local part.
        matrix: Index of their first matrix in the whole stack.
        matrices: Number of matrices.
    """

    rows: slice
    matrix: int
    matrices: int


class Rows:
    """The part as local rows ``(rows, n)``; kernels ``(out, in, k, ...)`` whose part is a matrix have ``out`` rows.

    Args:
        part: The part of the parameter that this process holds.
        x: Its local entries.
        grain: Pieces begin at multiples of so many rows, counted from the first row of a matrix.
        transposed: Whether the weights are ``(in, out)``.
    """

    def __init__(self, part: Part, x: Tensor, grain: int = 1, transposed: bool = False) -> None:
        self.part, self.grain, self.transposed = part, grain, transposed
        self.kernel, self.device = x.dim() > len(part.shape), x.device
        self.shape = as_matrix(x).shape if self.kernel else x.shape
        on_cpu = x.device.type == "cpu"
        self.limit, self.small = (PIECE_ON_CPU, SMALL_ON_CPU) if on_cpu else (PIECE, SMALL)
        self.stack = min(self.limit, STACK)

    @property
    def count(self) -> int:
        """Number of local rows."""
        return math.prod(self.shape[:-1])

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces, each of which is processed at once."""
        *stack, rows, n = self.shape
        first, count = self.part.offsets[0] * math.prod(stack[1:]) if stack else 0, math.prod(stack)
        if self.shape.numel() == 0:
            return
        if rows * n <= self.limit:
            at_once = self.limit // (rows * n)
            for i in range(0, count, at_once):
                matrices = min(at_once, count - i)
                yield Piece(slice(i * rows, (i + matrices) * rows), first + i, matrices)
            return
        at_once = max(1, self.limit // (n * self.grain)) * self.grain
        for i in range(count):
            for row in range(0, rows, at_once):
                yield Piece(slice(i * rows + row, i * rows + min(row + at_once, rows)), first + i, 1)

    def take(self, t: Tensor, rows: slice) -> Tensor:
        """Return a view of rows of a tensor that has this layout."""
        t = local(t)
        if t.dim() > len(self.shape):
            t = as_matrix(t)
        return t.view(math.prod(t.shape[:-1]), t.shape[-1])[rows]

    def shaped(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return all rows in the shape of the part."""
        return as_kernel(rows, like) if self.kernel else rows.view(like.shape)

    def width(self, rows: slice) -> int:
        """Return the length of the rows."""
        return self.shape[-1]

    def before(self, rows: slice, each: int) -> int:
        """Return how many entries of the first group of ``each`` lie before these rows."""
        return 0

    def aligned(self, t: Tensor, rows: slice, each: int) -> Tensor:
        """Pad ``t`` in front so that it begins with a whole group."""
        before = self.before(rows, each)
        return torch.nn.functional.pad(t, (before, 0)) if before else t

    def groups(self, t: Tensor, rows: slice, each: int) -> Tensor:
        """Return a view of these rows in ``t``, which has one number for every ``each`` entries of a row."""
        return self.take(t, rows)

    def room(self, each: int, rows: int = 1) -> tuple[int, ...]:
        """Return the shape of a tensor with one number for every ``each`` entries of a row, or of ``rows`` rows."""
        return (*self.shape[:-2], -(-self.shape[-2] // rows), -(-self.shape[-1] // each))

    def noise(self, rows: slice, seed: int) -> Tensor:
        """Return random int32 for rows, which depend on the place in the whole tensor."""
        return self.part.noise(self.shape, rows, seed, self.device)

    def places(self, rows: slice, seed: int) -> Places | None:
        """Return where :meth:`noise` begins in its tables; None where its rows are not consecutive there."""
        return self.part.places(self.shape, rows, seed)

    def index(self, rows: slice, axis: int) -> Tensor:
        """Return the indices of entries along an axis of the whole tensor, broadcastable to ``(rows, n)``.

        Args:
            rows: The rows.
            axis: 0 for the row in the matrix, 1 for the column, 2 for the matrix in its stack.
        """
        if axis == 1:
            return torch.arange(self.shape[-1], device=self.device)[None] + self.part.offsets[-1]
        row = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
        if axis == 0:
            return row % self.shape[-2] + self.part.offsets[-2]
        first = self.part.offsets[0] * math.prod(self.shape[1:-2]) if len(self.shape) > 2 else 0
        return row // self.shape[-2] + first

    def row_index(self, rows: slice) -> Tensor:
        """Return the indices of rows among those of all matrices of the whole tensor, as :meth:`index` does."""
        return self.index(rows, 2) * self.part.shape[-2] + self.index(rows, 0)
