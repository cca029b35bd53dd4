"""One constrained parameter, with its split and mask in the optimizer's state, accessed some rows at a time.

The optimizer may hold the parameter whole, as a DTensor or as a flat slice (FSDP1). This module presents it always as
local rows ``(rows, n)``; its layout (:class:`~elsa_lightning.layout.rows.Rows`) knows where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elsa_lightning.errors import UserError
from elsa_lightning.layout import fused
from elsa_lightning.layout.fsdp1 import FlatSlice
from elsa_lightning.layout.kernels import channels_last, is_transposed, lies_in_rows
from elsa_lightning.layout.lowbit import BLOCK, StateDtype, as_integers, decode, encode, pack, unpack, unpack_wide
from elsa_lightning.layout.rows import Piece, Rows, on_host
from elsa_lightning.layout.sharded import Part, clean, laid_out_like, local
from elsa_lightning.optim.moments import dtype_name, lays_out_anew, second_moment
from elsa_lightning.sets.base import Point

SPLIT = "elsa_split"  # s = z − u; only −u in forms whose weights stay on the set
SCALE = SPLIT + "_scale"  # scales of the split's float8 blocks
MASK = "elsa_mask"  # one bit a weight, 1 where it is kept
NUMBERS = "elsa_numbers"  # a number that the set chose for each group of weights, such as the scale of its grid
REMOVED = "elsa_removed"  # the values that finish(resumable=True) removed from the weights
KEYS = (SPLIT, SCALE, MASK, NUMBERS, REMOVED)
DENSE = (MASK, SPLIT, REMOVED)  # tensors that FSDP1 saves


class Factors(NamedTuple):
    """What F̂ of one tensor, or of each of a stack, is held towards during an update (:mod:`elsa_lightning.fisher`).

    Attributes:
        rows: R/M, ``(tensors, rows of the whole tensor)``; 1 where all F̂ are 0.
        columns: C, ``(tensors, columns)``; likewise.
        share: n₀ / (n + n₀).
    """

    rows: Tensor
    columns: Tensor
    share: float

    def hold(self, moment: Tensor, layout: Rows, rows: slice) -> Tensor:
        """Return rows of F̂, held towards the product; of a stack, these rows of each tensor."""
        product = self.rows[:, layout.row_index(rows)] * self.columns[:, layout.index(rows, 1)]
        dtype = torch.promote_types(moment.dtype, product.dtype)
        return torch.lerp(moment.to(dtype), product.view_as(moment).to(dtype), self.share).to(moment.dtype)


class ConstrainedTensor:
    """One constrained parameter.

    Args:
        name: Name of the parameter.
        p: The parameter.
        part: The part of it that this process holds.
        optimizer: The optimizer that trains the parameter and keeps its state.
        state_dtype: The dtype in which the split is stored.
        grain: Number of rows that no piece may divide.
        shared: Rows × columns for which the set chooses one number; None if it chooses none.

    Attributes:
        kind: Small tensors of equal kind can be stacked; None for a tensor that cannot.
    """

    factors: Factors | None = None

    def __init__(
        self, name: str, p: nn.Parameter, part: Part, optimizer: Optimizer, state_dtype: StateDtype, grain: int = 1,
        shared: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.shared = shared
        self.name, self.p, self.part, self.optimizer, self.state_dtype = name, p, part, optimizer, state_dtype
        x = local(p)
        if not _in_rows(x, part):
            raise UserError(
                f"{name} has shape {tuple(p.shape)} with strides {tuple(x.stride())}, and its rows are not below each "
                f"other in memory: make it contiguous()"
            )
        self.aside: Tensor | None = None  # a packed mask, kept here until the optimizer has state of its own
        self.layout: Rows = (Rows if part.start is None else FlatSlice)(part, x, grain, is_transposed(p))
        self._channels_last = self.layout.kernel and channels_last(x)
        alone = shared is not None or part.start is not None or self.layout.kernel or len(part.shape) != 2
        kind = f"{part} {tuple(x.shape)} {p.dtype} {x.device} {self.layout.transposed} {grain}"
        self.kind = None if alone or not 0 < x.numel() <= self.layout.small else kind
        if self._channels_last and lays_out_anew(optimizer):
            raise UserError(
                f"{name} is channels_last, and {type(optimizer).__name__} of bitsandbytes lays weights out anew: call "
                f"model.to(memory_format=torch.contiguous_format), inputs can stay channels_last; or take "
                f"elsa_lightning.optim.adam8bit.Adam8bit"
            )

    @property
    def described(self) -> str:
        """Name, shape and, for channels_last kernels, the memory format: it determines the order of a row's entries."""
        return f"{clean(self.name)}{tuple(self.part.shape)}" + " channels_last" * self._channels_last

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of the parameter, empty before the first step; reading it creates none."""
        state: dict[str, Any] = self.optimizer.state.get(self.p, {})
        return state

    @property
    def inputs(self) -> int:
        """Number of inputs of each output of the whole layer."""
        return self.part.shape[-2 if self.layout.transposed and len(self.part.shape) > 1 else -1]

    def point(self, index: int, piece: Piece, v: Tensor, importance: Tensor | None = None) -> Point:
        """Return some rows as a :class:`~elsa_lightning.sets.base.Point`, the form in which a set sees them.

        Args:
            index: Index of this tensor among the points.
            piece: The rows.
            v: Their x + u.
            importance: Their F̂.
        """
        numbers = self.numbers(piece.rows) if self.has(NUMBERS) else None
        return Point(v, importance, index, self.name, piece, self.layout, numbers, self.p.dtype)

    @property
    def stepped(self) -> bool:
        """Whether the optimizer has state of its own for the parameter."""
        return bool(self.state.keys() - set(KEYS))

    def has(self, key: str) -> bool:
        """Return whether the state has this tensor of ours, or a mask is set aside for it."""
        return key in self.state or (key == MASK and self.aside is not None)

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of the part, each of which is processed at once."""
        return self.layout.pieces()

    def x(self, rows: slice) -> Tensor:
        """Return a view of rows of the weights.

        Raises:
            ValueError: The memory format of a kernel was changed, and the masks are in the former one.
        """
        x = self.p.detach()
        if self.layout.kernel and channels_last(local(x)) != self._channels_last:
            raise UserError(
                f"the memory format of {self.name} was changed after pruning had begun, and its mask has the former "
                f"one: call model.to(memory_format=...) before"
            )
        return self.layout.take(x, rows)

    def grad(self, rows: slice) -> Tensor:
        """Return a view of rows of the gradient."""
        assert self.p.grad is not None
        grad = local(self.p.grad)
        if grad.is_sparse:
            raise UserError(
                f"{self.name} has sparse gradients (Embedding(sparse=True)): leave it dense, or sparse=False"
            )
        if not _in_rows(grad, self.part) or (self.layout.kernel and channels_last(grad) != self._channels_last):
            self.p.grad = torch.empty_like(self.p).copy_(self.p.grad)  # laid out as the weights are
        return self.layout.take(self.p.grad, rows)

    def moment(self, rows: slice) -> Tensor | None:
        """Return rows of the second moment, or None where the optimizer keeps none."""
        return second_moment(self.optimizer, self.p, rows)

    def importance(self, rows: slice) -> Tensor | None:
        """Return rows of F̂, or None where the optimizer keeps no second moment."""
        moment = self.moment(rows)
        return moment if moment is None or self.factors is None else self.factors.hold(moment, self.layout, rows)

    def seed(self, of: Callable[[nn.Parameter], int]) -> Any:
        """Return the parameter's seed in the form that :meth:`set_split` takes."""
        return of(self.p)

    def noise(self, rows: slice, seed: Any) -> Tensor:
        """Return random int32 for rows, which depend on the place in the whole tensor and so not on the sharding."""
        return self.layout.noise(rows, seed)

    @property
    def packed(self) -> Tensor:
        """The mask as stored, 8 entries a byte."""
        packed: Tensor = self.state[MASK] if self.aside is None else self.aside
        return packed

    def mask(self, rows: slice) -> Tensor:
        """Return rows of the mask, True where a weight is kept."""
        return self.unpacked(self.packed, rows)

    def unpacked(self, packed: Tensor, rows: slice) -> Tensor:
        """Return rows of a packed mask as booleans."""
        before = self.layout.before(rows, 8)
        return unpack(self.layout.groups(packed, rows, 8), before + self.layout.width(rows))[..., before:]

    def masked(self, values: Tensor, rows: slice, packed: Tensor, kept: bool = True) -> Tensor:
        """Return values of rows where a packed mask keeps them, or where it does not, and 0 elsewhere."""
        if not on_host(values):  # a GPU reads one byte a weight and needs no branch
            mask = self.unpacked(packed, rows)
            return torch.where(mask if kept else ~mask, values, 0)
        bits = self._wide(rows, values.dtype, kept, packed)
        return bits.bitwise_and_(as_integers(values)).view(values.dtype)

    def line(self, t: Tensor, slow: Tensor | None = None, seed: Any = None) -> fused.Line | None:
        """Return the arguments with which a fused kernel handles all rows at once; None where it cannot.

        Args:
            t: The weights, or a tensor with the same layout.
            slow: What a step is divided by before the split takes it; None to leave the split alone.
            seed: Seed for rounding the split.
        """
        layout, everything = self.layout, slice(None)
        if not fused.usable(layout.device) or type(layout) is not Rows or layout.kernel:
            return None
        line = fused.Line(layout.take(t, everything), layout.groups(self.packed, everything, 8))
        tensors = [line.x, line.packed]
        if slow is not None:
            if (places := layout.places(everything, seed)) is None:
                return None
            scale = layout.groups(self.state[SCALE], everything, BLOCK) if self.has(SCALE) else None
            split = layout.take(self.state[SPLIT], everything)
            line = line._replace(split=split, scale=scale, slow=slow, places=places)
            tensors += [split] if scale is None else [split, scale]
        return line if fused.takes(*tensors) else None

    def take_off(self, rows: slice) -> Tensor:
        """Zero rows of the weights off the mask; return their values from before, with 0 on the mask."""
        if not on_host(x := self.x(rows)):
            off = ~self.mask(rows)
            d = torch.where(off, x, 0)
            x.masked_fill_(off, 0)
            return d
        off, bits = self._wide(rows, self.p.dtype, kept=False), as_integers(x)
        bits ^= off.bitwise_and_(bits)
        return off.view(self.p.dtype)

    def zero_off(self, t: Tensor, rows: slice) -> None:
        """Zero entries off the mask, NaN included, in rows of a tensor that has the layout of the weights."""
        of = self.layout.take(t, rows)
        if on_host(of):
            as_integers(of).bitwise_and_(self._wide(rows, of.dtype, kept=True))
        else:  # a GPU reads one byte a weight and needs no branch
            of.masked_fill_(~self.mask(rows), 0)

    def _wide(self, rows: slice, dtype: torch.dtype, kept: bool, packed: Tensor | None = None) -> Tensor:
        """Return integers of a dtype's width, with all bits set where the mask keeps (or does not keep) a weight."""
        before = self.layout.before(rows, 8)
        packed = self.packed if packed is None else packed
        groups, n = self.layout.groups(packed, rows, 8), before + self.layout.width(rows)
        return unpack_wide(groups, n, dtype, kept)[..., before:]

    def set_mask(self, rows: slice, mask: Tensor, packed: Tensor | None = None) -> None:
        """Store rows of the mask, in the state or in a tensor from :meth:`room_for_mask`."""
        stored = self.layout.groups(self.state[MASK] if packed is None else packed, rows, 8)
        stored.copy_(pack(self.layout.aligned(mask, rows, 8)))

    def room_for_mask(self) -> Tensor:
        """Return a new packed mask that keeps nothing."""
        return torch.zeros(self.layout.room(8), dtype=torch.uint8, device=self.layout.device)

    def take_mask(self, packed: Tensor) -> None:
        """Store the mask of all rows, packed as by :meth:`room_for_mask`."""
        local(self.state[MASK]).copy_(packed)

    def put_mask(self) -> None:
        """Move a mask that was set aside into the optimizer's state."""
        if self.aside is not None:
            self.allocate(MASK)
            self.take_mask(self.aside)
            self.aside = None

    def split(self, rows: slice) -> Tensor:
        """Return rows of s, in at least float32."""
        stored = self.layout.take(self.state[SPLIT], rows)
        if not self.has(SCALE):
            return decode(stored, None)
        exponents = self.layout.groups(self.state[SCALE], rows, BLOCK)
        return decode(self.layout.aligned(stored, rows, BLOCK), exponents)[..., self.layout.before(rows, BLOCK) :]

    def set_split(self, rows: slice, values: Tensor, seed: Any) -> None:
        """Store rows of s, rounded to the state dtype."""
        each, layout = BLOCK if self.state_dtype == "float8_e4m3fn" else 1, self.layout
        if self.state_dtype == "float32":
            stored = layout.take(self.state[SPLIT], rows)
            if stored.data_ptr() != values.data_ptr():  # else values is a view of it, changed in place
                stored.copy_(values)
            return
        aligned = layout.aligned(values, rows, each)
        stored, scale = encode(aligned, self.state_dtype, lambda: layout.aligned(self.noise(rows, seed), rows, each))
        layout.take(self.state[SPLIT], rows).copy_(stored[..., layout.before(rows, each) :])
        if scale is not None:
            layout.groups(self.state[SCALE], rows, each).copy_(scale)

    def numbers(self, rows: slice) -> Tensor:
        """Return a view of the numbers of the groups in some rows."""
        assert self.shared is not None
        each = self.shared[0]
        return self.layout.take(self.state[NUMBERS], slice(rows.start // each, -(-rows.stop // each)))

    def removed(self, rows: slice) -> Tensor:
        """Return a view of rows of the removed values, 0 where nothing was removed."""
        return self.layout.take(self.state[REMOVED], rows)

    def set_removed(self, rows: slice, values: Tensor) -> None:
        """Store rows of the removed values."""
        self.removed(rows).copy_(values)

    def allocate(self, *keys: str) -> None:
        """Create tensors of ours in the optimizer's state, with zeros, where they do not exist yet."""
        for key in keys:
            if key in self.state or (key == SCALE and self.state_dtype != "float8_e4m3fn"):
                continue
            if key == NUMBERS and self.shared is None:
                continue
            each, dtype = self._kinds[key]
            rows = self.shared[0] if key == NUMBERS and self.shared is not None else 1
            empty = torch.zeros(self.layout.room(each, rows), dtype=dtype, device=self.layout.device)
            whole = self.part.shape
            self.optimizer.state[self.p][key] = laid_out_like(self.p, empty, -(-whole[-1] // each), whole[-2] // rows)

    @property
    def _kinds(self) -> dict[str, tuple[int, torch.dtype]]:
        """How many entries of a row share one element of each of our tensors, and its dtype."""
        wide = torch.promote_types(self.p.dtype, torch.float32)
        dtypes = {"float32": wide, "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.uint8}
        return {
            SPLIT: (1, dtypes[self.state_dtype]),
            SCALE: (BLOCK, torch.int8),
            MASK: (8, torch.uint8),
            NUMBERS: (1 if self.shared is None else self.shared[1], torch.bfloat16),
            REMOVED: (1, self.p.dtype),
        }

    def cast_back(self) -> None:
        """Undo torch's cast of our tensors to the parameter's dtype, where state was loaded before ADMM was attached.

        Raises:
            ValueError: The cast rounded values.
        """
        if self.part.start is not None or not self.has(MASK):
            return
        stored = tuple(local(self.state[MASK]).shape)
        if stored != tuple(self.layout.room(8)) or stored == tuple(local(self.p).shape):
            return  # one element an entry, as FSDP1 saves it
        for key in [key for key in KEYS if self.has(key)]:
            stored, dtype = self.state[key], self._kinds[key][1]
            if dtype.is_floating_point and torch.promote_types(stored.dtype, dtype) != stored.dtype:
                raise UserError(
                    f"the optimizer's state was loaded before ADMM was attached to it, which rounded {key} of "
                    f"{self.name} to {dtype_name(stored.dtype)}, the weights' dtype: attach ADMM first and load then, "
                    f"or keep the state in that dtype (state_dtype)"
                )
            self.state[key] = stored.to(dtype)

    def write(self, *keys: str) -> None:
        """Do nothing, since changes are made in place; :class:`~elsa_lightning.stacks.Stack` writes its copy back."""

    def release(self, *keys: str) -> None:
        """Drop tensors of ours from the optimizer's state."""
        for key in keys:
            self.state.pop(key, None)

    def dense(self) -> dict[str, Tensor]:
        """Return our tensors with one number an entry, in the shape of the part: FSDP1 can save only these."""
        wide = torch.promote_types(self.p.dtype, torch.float32)
        read = {SPLIT: self.split, MASK: self.mask, REMOVED: self.removed}
        return {
            key: torch.cat([read[key](piece.rows).to(wide).flatten() for piece in self.pieces()])
            for key in DENSE
            if self.has(key) and self.p.numel()
        }

    def take_dense(self, dense: dict[str, Tensor]) -> None:
        """Store tensors from :meth:`dense`, of this layout or another, without rounding them."""
        for key, values in dense.items():
            self.allocate(key, *([SCALE] if key == SPLIT else []))
            for rows, *_ in self.pieces():
                piece = self.layout.take(values, rows)
                if key == SPLIT:
                    self.set_split(rows, piece, seed=0)  # rounds nothing: it was rounded before
                elif key == MASK:
                    self.set_mask(rows, piece != 0)
                else:
                    self.set_removed(rows, piece.to(self.p.dtype))


def _in_rows(t: Tensor, part: Part) -> bool:
    """Return whether kernels, or the matrices of a stack, can be viewed as rows below each other without a copy."""
    return lies_in_rows(t) if t.dim() > len(part.shape) else t.dim() < 3 or t.is_contiguous()
