"""A constrained parameter with its split and mask in the optimizer's state, some rows at a time.

Whatever is done to a large tensor is done in pieces of rows, so that nothing of its size comes and goes. The
optimizer may hold the parameter whole or as a DTensor; here it is always local rows ``(rows, n)``. Of a flat slice
(FSDP1) a piece is some of its entries, ``(1, n)``; bits and blocks lie as they do in the flattened whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.layout.lowbit import BLOCK, StateDtype, decode, encode, pack, unpack
from elsa_lightning.layout.sharded import Part, laid_out_like, local
from elsa_lightning.optim.moments import second_moment

SPLIT = "elsa_split"  # s = z − u; with prox 'hard' −u alone
SCALE = SPLIT + "_scale"  # of float8 blocks
MASK = "elsa_mask"  # one bit a weight, 1 where it is kept
REMOVED = "elsa_removed"  # what finish(resumable=True) took off the weights
KEYS = (SPLIT, SCALE, MASK, REMOVED)

PIECE = 1 << 24  # entries worked on at once: enough to keep a device busy
_PIECE_ON_CPU = 1 << 18  # what its cache holds


class Piece(NamedTuple):
    """Some rows of a part: of one matrix, or of some matrices of a stack. Of a flat slice ``rows`` are entries."""

    rows: slice
    matrix: int
    matrices: int


class ConstrainedTensor:
    """One constrained parameter.

    Args:
        p: The parameter.
        part: Which part of it this process holds.
        optimizer: Who trains it and keeps its state.
        state_dtype: What the split is kept in.
    """

    def __init__(self, p: nn.Parameter, part: Part, optimizer: Optimizer, state_dtype: StateDtype) -> None:
        self.p, self.part, self.optimizer, self.state_dtype = p, part, optimizer, state_dtype
        if not _in_rows(p):
            raise ValueError(
                f"a stack of matrices of shape {tuple(p.shape)} has strides {tuple(local(p).stride())}, and its rows "
                f"are not below each other in memory: make it contiguous()"
            )

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of it, empty before the first step; looking creates none."""
        state: dict[str, Any] = self.optimizer.state.get(self.p, {})
        return state

    @property
    def stepped(self) -> bool:
        """Whether the optimizer has state of its own."""
        return bool(self.state.keys() - set(KEYS))

    def has(self, key: str) -> bool:
        """Say whether the state has a tensor of ours."""
        return key in self.state

    def pieces(self) -> Iterator[Piece]:
        """Yield what of the part is worked on at once."""
        x = local(self.p)
        if self._flat:
            yield from self._flat_pieces(x)
            return
        *stack, rows, n = x.shape
        first = self.part.offsets[0] * math.prod(stack[1:]) if stack else 0
        limit, count = _PIECE_ON_CPU if x.device.type == "cpu" else PIECE, math.prod(stack)
        if x.numel() == 0:
            return
        if rows * n <= limit:
            at_once = limit // (rows * n)
            for i in range(0, count, at_once):
                matrices = min(at_once, count - i)
                yield Piece(slice(i * rows, (i + matrices) * rows), first + i, matrices)
            return
        at_once = max(1, limit // n)
        for i in range(count):
            for row in range(0, rows, at_once):
                yield Piece(slice(i * rows + row, i * rows + min(row + at_once, rows)), first + i, 1)

    @property
    def _flat(self) -> bool:
        return self.part.start is not None

    def _flat_pieces(self, x: Tensor) -> Iterator[Piece]:
        start, size = self.part.start or 0, math.prod(self.part.shape[-2:])
        limit = _PIECE_ON_CPU if x.device.type == "cpu" else PIECE
        at = 0
        while at < x.numel():
            place = start + at
            stop = min((place // limit + 1) * limit, (place // size + 1) * size, start + x.numel()) - start
            yield Piece(slice(at, stop), place // size, 1)
            at = stop

    @property
    def rows(self) -> int:
        """How many rows the part has; of a flat slice, how many entries."""
        shape = local(self.p).shape
        return math.prod(shape if self._flat else shape[:-1])

    def x(self, rows: slice) -> Tensor:
        """Return rows of the weights, in the same memory."""
        return self._rows(self.p.detach(), rows)

    def grad(self, rows: slice) -> Tensor:
        """Return rows of the gradient, in the same memory."""
        assert self.p.grad is not None
        if not _in_rows(self.p.grad):
            self.p.grad = self.p.grad.contiguous()
        return self._rows(self.p.grad, rows)

    def importance(self, rows: slice) -> Tensor | None:
        """Return rows of F̂, or None where the optimizer keeps no second moment."""
        return second_moment(self.optimizer, self.p, rows)

    def noise(self, rows: slice, seed: int) -> Tensor:
        """Return random int32 for rows, by their place in the whole."""
        return self.part.noise(local(self.p).shape, rows, seed, self.p.device)

    def mask(self, rows: slice) -> Tensor:
        """Return rows of the mask, True where a weight is kept."""
        before = self._before(rows, 8)
        n = rows.stop - rows.start if self._flat else local(self.p).shape[-1]
        return unpack(self._groups(self.state[MASK], rows, 8), before + n)[..., before:]

    def set_mask(self, rows: slice, mask: Tensor) -> None:
        """Store rows of the mask."""
        self._groups(self.state[MASK], rows, 8).copy_(pack(self._aligned(mask, rows, 8)))

    def split(self, rows: slice) -> Tensor:
        """Return rows of s, in at least float32."""
        stored = self._rows(self.state[SPLIT], rows)
        if not self.has(SCALE):
            return decode(stored, None)
        exponents = self._groups(self.state[SCALE], rows, BLOCK)
        return decode(self._aligned(stored, rows, BLOCK), exponents)[..., self._before(rows, BLOCK) :]

    def set_split(self, rows: slice, values: Tensor, seed: int) -> None:
        """Store rows of s, rounded to what they are kept in."""
        each = BLOCK if self.state_dtype == "float8_e4m3fn" else 1
        aligned = self._aligned(values, rows, each)
        stored, exponents = encode(aligned, self.state_dtype, lambda: self._aligned(self.noise(rows, seed), rows, each))
        self._rows(self.state[SPLIT], rows).copy_(stored[..., self._before(rows, each) :])
        if exponents is not None:
            self._groups(self.state[SCALE], rows, each).copy_(exponents)

    def removed(self, rows: slice) -> Tensor:
        """Return rows of what was taken off the weights, 0 where nothing was."""
        return self._rows(self.state[REMOVED], rows)

    def set_removed(self, rows: slice, values: Tensor) -> None:
        """Store rows of what is taken off the weights."""
        self.removed(rows).copy_(values)

    def allocate(self, *keys: str) -> None:
        """Make room for tensors of ours in the optimizer's state, where there is none yet."""
        x, n = local(self.p), self.part.shape[-1]
        wide = torch.promote_types(self.p.dtype, torch.float32)
        dtypes = {"float32": wide, "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.uint8}
        layout = {
            SPLIT: (1, dtypes[self.state_dtype]),
            SCALE: (BLOCK, torch.int8),
            MASK: (8, torch.uint8),
            REMOVED: (1, self.p.dtype),
        }
        for key in keys:
            if self.has(key) or (key == SCALE and self.state_dtype != "float8_e4m3fn"):
                continue
            each, dtype = layout[key]
            if self._flat:
                length = -(-(x.numel() + self._before(slice(0, 0), each)) // each) if x.numel() else 0
                self.optimizer.state[self.p][key] = torch.zeros(length, dtype=dtype, device=x.device)
                continue
            empty = torch.zeros((*x.shape[:-1], -(-x.shape[-1] // each)), dtype=dtype, device=x.device)
            self.optimizer.state[self.p][key] = laid_out_like(self.p, empty, -(-n // each))

    def release(self, *keys: str) -> None:
        """Drop tensors of ours from the optimizer's state."""
        for key in keys:
            self.state.pop(key, None)

    def dense(self) -> dict[str, Tensor]:
        """Return our tensors in the shape of the part, one number an entry: what FSDP1 can save."""
        wide = torch.promote_types(self.p.dtype, torch.float32)
        read = {SPLIT: self.split, MASK: self.mask, REMOVED: self.removed}
        return {
            key: torch.cat([read[key](piece.rows).to(wide).flatten() for piece in self.pieces()])
            for key in read
            if self.has(key) and self.p.numel()
        }

    def take_dense(self, dense: dict[str, Tensor]) -> None:
        """Store what :meth:`dense` returned, of this layout or another; the numbers stay the same."""
        for key, values in dense.items():
            self.allocate(key, *([SCALE] if key == SPLIT else []))
            for rows, *_ in self.pieces():
                piece = self._rows(values, rows)
                if key == SPLIT:
                    self.set_split(rows, piece, seed=0)  # rounds nothing: it was rounded before
                elif key == MASK:
                    self.set_mask(rows, piece != 0)
                else:
                    self.set_removed(rows, piece.to(self.p.dtype))

    def _rows(self, t: Tensor, rows: slice) -> Tensor:
        if self._flat:
            return t[None, rows]
        t = local(t)
        return t.view(math.prod(t.shape[:-1]), t.shape[-1])[rows]

    def _before(self, rows: slice, each: int) -> int:
        """Return how many entries of their first group of ``each`` lie before these entries of a flat slice."""
        return 0 if self.part.start is None else (self.part.start + rows.start) % each

    def _aligned(self, t: Tensor, rows: slice, each: int) -> Tensor:
        """Fill up ``t`` in front so that it begins with a whole group."""
        before = self._before(rows, each)
        return torch.nn.functional.pad(t, (before, 0)) if before else t

    def _groups(self, t: Tensor, rows: slice, each: int) -> Tensor:
        """Return what ``t`` has of these rows, with one number for every ``each`` entries."""
        if self.part.start is None:
            return self._rows(t, rows)
        start, first = self.part.start, self.part.start // each
        return t[None, (start + rows.start) // each - first : -(-(start + rows.stop) // each) - first]


def _in_rows(t: Tensor) -> bool:
    """Say whether the matrices of a stack can be seen as rows below each other, in the same memory."""
    t = local(t)
    return t.dim() < 3 or t.is_contiguous()
