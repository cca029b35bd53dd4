"""Unstructured sparsity: a number of single entries in each row, each tensor or all together may be non-zero."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.layout.lowbit import ones, pack, unpack
from elsa_lightning.layout.rows import is_host
from elsa_lightning.layout.sharded import exact_dtype, sent
from elsa_lightning.sets import threshold
from elsa_lightning.sets.base import Constraint, Point, Points, check_set, distance, weighted
from elsa_lightning.sets.checks import check_budget, check_fraction, entries_of, is_number
from elsa_lightning.sets.threshold import Scores, largest, largest_of_each, largest_of_rows, rows_of

_FLOOR = 1 / 20  # with one budget for all tensors: the least share that survives, of the share in all
AT_ONCE = 0.7  # sparsity at which a ramp begins: the first projection cuts so much, and entries may return later


@dataclass(frozen=True, repr=False)
class Unstructured(Constraint):
    """Of n entries, (1 − sparsity) · n, to the nearest, may be non-zero.

    The projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over z with so many non-zeros: it keeps the largest Fᵢ vᵢ², unchanged.
    Ties go to the larger magnitude, then to the lower index, so that exactly so many entries survive.

    Args:
        sparsity: Fraction of zeros, 0 ≤ sparsity < 1. At least one entry survives.
        scope: Where the fraction holds. ``model``: in all n entries of all tensors. ``tensor``: in each tensor of n
            entries (in each expert of a fused tensor). ``row``: in the n inputs of each output. With ``model`` a matrix
            whose F vᵢ² are all 0 keeps the common share; if one tensor has no F, magnitudes are not comparable, and
            all are ranked by F v² relative to its mean over the matrix.
        keep: How many weights survive in all, instead of ``sparsity``, such as 30e6.
        floor: With scope ``model``: the least share of a tensor that survives, so that none is emptied; by default a
            twentieth of the share that survives in all.
        ceiling: With scope ``model``: the largest share of a tensor that survives.
        depth: With scope ``tensor``: by how much the sparsity of the last block is above ``sparsity``, and that of the
            first below, linear in between; the overall fraction stays. A tensor's block is the first number in its
            name.
        keep_bytes: How many bytes the surviving weights take in all, instead of ``sparsity``, such as 60e6. Only their
            values count, in the dtype in which they are trained (inside ``Quantized``, in its bits); their positions
            and unconstrained weights do not.

    Raises:
        UserError: A value is out of range.
    """

    sparsity: float | None = None
    scope: Literal["model", "tensor", "row"] = "model"
    keep: float | None = None
    floor: float | None = None
    ceiling: float = 1.0
    depth: float = 0.0
    keep_bytes: float | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.sparsity, self.keep, self.keep_bytes)) != 1:
            raise UserError(
                f"give sparsity (a fraction of zeros, such as 0.9), keep (weights that survive, such as 30e6) or "
                f"keep_bytes (that these take), one of the three; got sparsity={self.sparsity}, keep={self.keep}, "
                f"keep_bytes={self.keep_bytes}"
            )
        if self.sparsity is not None:
            check_fraction("sparsity", self.sparsity, "a fraction of zeros")
        check_budget("weights", "a fraction is sparsity", keep=self.keep, keep_bytes=self.keep_bytes)
        if self.scope not in ("tensor", "row", "model"):
            raise UserError(f"scope must be 'tensor', 'row' or 'model', got {self.scope!r}")
        floor = 0.0 if self.floor is None else self.floor
        for name, value in (("floor", floor), ("ceiling", self.ceiling), ("depth", self.depth)):
            if not is_number(value) or not -1 < value <= 1:
                raise UserError(f"{name} must be a share of a tensor's entries, such as 0.02, got {value!r}")
        kept = 1.0 if self.sparsity is None else 1 - self.sparsity
        if not (
            0 <= floor <= self.ceiling <= 1 and (self.sparsity is None or floor - 1e-9 <= kept <= self.ceiling + 1e-9)
        ):
            raise UserError(
                f"floor and ceiling are shares that survive, and what survives in all, {kept:g}, must lie between; "
                f"got floor={floor:g}, ceiling={self.ceiling:g}"
            )
        if (floor > 0 or self.ceiling < 1) and self.scope != "model":
            raise UserError(f"floor and ceiling are for scope='model'; with scope={self.scope!r} all are pruned alike")
        if self.depth and self.scope != "tensor":
            raise UserError(f"depth is for scope='tensor', got scope={self.scope!r}")

    def __repr__(self) -> str:
        """Return the arguments that differ from their defaults, and the scope."""
        said = [f.name for f in fields(self) if f.name == "scope" or getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in said)})"

    def grain_of(self, name: str) -> tuple[int, int]:
        """Return a whole row with scope ``row``, since each is projected by itself."""
        return (1, 0) if self.scope == "row" else self.grain

    def sized(self, shapes: Mapping[str, torch.Size], bytes_each: Mapping[str, float] | None = None) -> Unstructured:
        """Return the set with ``sparsity`` instead of ``keep`` or ``keep_bytes``."""
        if self.sparsity is not None:
            return self
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        total, kept = sum(sizes.values()), entries_of(self.keep, self.keep_bytes, sizes, bytes_each)
        if kept > total:
            said, given = ("keep", self.keep) if self.keep is not None else ("keep_bytes", self.keep_bytes or 0.0)
            of = "weights" if said == "keep" else "bytes"
            raise UserError(
                f"{said}={given:g} {of} of the {given * total / kept:,.0f} that are constrained: give fewer"
            )
        return replace(self, sparsity=1 - max(1.0, kept) / total, keep=None, keep_bytes=None)

    def relaxed(self, tightness: float) -> Unstructured:
        """Return the set with a sparsity that grows from ``AT_ONCE``, or less if the target is less, to the target."""
        start = min(self._sparsity, AT_ONCE)
        now = start + (self._sparsity - start) * tightness
        return replace(self, sparsity=now, ceiling=max(self.ceiling, 1 - now))

    @property
    def stacks(self) -> bool:  # type: ignore[override]
        """Whether :meth:`support` yields masks of stacks; a subclass that overrides it does not."""
        return type(self).support is Unstructured.support

    @property
    def _sparsity(self) -> float:
        if self.sparsity is None:
            raise UserError("keep and keep_bytes need to know the tensors: use the set that sized(shapes) returns")
        return self.sparsity

    @property
    def _floor(self) -> float:
        return _FLOOR * (1 - self._sparsity) if self.floor is None else self.floor

    def kept(self, entries: int) -> int:
        """Return how many of so many entries survive."""
        return max(1, entries - round(self._sparsity * entries))

    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the masks of the entries with the largest F v²."""
        if self.scope == "row":
            yield from self._of_rows(points)
            return
        stacks = [math.prod(shape[:-2]) for shape in points.shapes]
        starts = [sum(stacks[:index]) for index in range(len(stacks))]
        sizes = [
            shape[-2] * shape[-1] for shape, stack in zip(points.shapes, stacks, strict=True) for _ in range(stack)
        ]
        scales: Tensor | None = None
        seen: list[_Seen] = []  # of each piece in the last pass

        def scores(matrices: Collection[int] | None) -> Iterator[Scores]:
            of, firsts = points.holding(matrices, starts)
            seen.clear()
            for point in of.stacked():
                shape = (point.piece.matrices, point.v.numel() // point.piece.matrices)
                score = weighted(point.v, point.importance).reshape(shape)  # compared by magnitude
                first, part = _matrices(point, firsts), point.part
                found = Scores(score, point.v.float().reshape(shape), first, part.counts, part.order)
                if self.scope == "model":
                    ends = score.amin(dim=1), score.amax(dim=1)  # ten times as fast as any(dim=1)
                    seen.append(_Seen(found.rows, part.counts, ends, point.importance is None))
                yield found if scales is None else found._replace(score=score / scales[found.rows, None])

        def keep(pools: list[int], kept: list[int]) -> Iterator[Tensor]:
            ranks, device = torch.tensor(kept, device=points.device), points.device
            of = (tuple(points.names), len(kept))
            return largest(
                scores, torch.tensor(pools, device=device), ranks, points.add, points.parts, points.guesses, of
            )

        each = list(range(len(sizes)))
        if self.scope == "tensor":
            kept = self._by_depth(points.names, stacks, sizes) if self.depth else [self.kept(size) for size in sizes]
            few = is_host(points.device) or points.device.type == "mps"  # their topk finds few entries
            if points.parts == 1 and not few and max(sizes) <= threshold.HELD:
                yield from largest_of_each(scores, torch.tensor(kept))
            else:
                yield from keep(each, kept)
            return
        former: dict[Hashable, Tensor] = {} if points.guesses is None else points.guesses
        unweighted, before = points.unweighted, (*points.names, "unweighted")
        unweighted |= before in former
        while True:  # once, unless the guess was wrong
            scales = _scales(points, starts, sizes) if unweighted else None
            masks = keep([0] * len(sizes), [self.kept(sum(sizes))])
            packed = [(pack(mask), mask.shape[1]) for mask in masks]
            *wanted, without = _survivors(points, seen, [bits for bits, _ in packed], len(sizes))
            if bool(without) == unweighted:
                break
            unweighted = not unweighted
        if scales is None:
            former.pop(before, None)
        else:
            former[before] = scales
        bounded = self._bounded(wanted, sizes)
        if bounded is not None:
            yield from keep(each, bounded)
            return
        for bits, columns in packed:
            yield unpack(bits, columns).contiguous()

    def _of_rows(self, points: Points) -> Iterator[Tensor]:
        for point in points.stacked():
            score, magnitude = distance(point.v, point.importance), point.v.abs().float()
            if point.transposed:  # the weights of an output are a column, and pieces have whole columns
                shape = (point.piece.matrices, -1, point.v.shape[-1])
                score, magnitude = (t.reshape(shape).transpose(1, 2) for t in (score, magnitude))
                mask = largest_of_rows(score, magnitude, self.kept(score.shape[-1])).transpose(1, 2)
                yield mask.reshape(point.v.shape)
            else:
                yield largest_of_rows(score, magnitude, self.kept(score.shape[-1]))

    def _by_depth(self, names: Sequence[str], stacks: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Return how many entries of each matrix survive: fewer in deeper blocks, with the same total."""
        found = [re.search(r"(?<![^.])\d+(?![^.])", name) for name in names]
        blocks = [None if match is None else int(match.group()) for match in found]
        last = max((block for block in blocks if block is not None), default=0)
        slopes = [0.0 if block is None or not last else self.depth * (2 * block / last - 1) for block in blocks]
        slope = [s for s, stack in zip(slopes, stacks, strict=True) for _ in range(stack)]
        low, high = -1.0, 1.0  # bounds of the common shift that makes the total right
        for _ in range(60):
            shift = (low + high) / 2
            zeros = [min(0.999, max(0.0, self._sparsity + s + shift)) for s in slope]
            too_few = sum(z * size for z, size in zip(zeros, sizes, strict=True)) < self._sparsity * sum(sizes)
            low, high = (shift, high) if too_few else (low, shift)
        return [max(1, size - round(z * size)) for z, size in zip(zeros, sizes, strict=True)]

    def _bounded(self, wanted: Sequence[float], sizes: Sequence[int]) -> list[int] | None:
        """Return how many entries of each matrix survive within floor and ceiling, or None if as many as ``wanted``.

        Matrices below their floor are raised to it at the expense of the others, in proportion to what these have
        above their own floor.

        Args:
            wanted: How many entries of each matrix are among the largest of all; −1 where scores say nothing, as of an
                expert that no token was sent to: it keeps the common share.
            sizes: How many entries each has.
        """
        floors = [self._floor if want >= 0 else 1 - self._sparsity for want in wanted]
        least = [
            max(float(floor > 0), math.ceil(floor * size - 1e-6)) for floor, size in zip(floors, sizes, strict=True)
        ]
        most = [max(low, math.floor(self.ceiling * size + 1e-6)) for low, size in zip(least, sizes, strict=True)]
        if all(b <= w <= t for w, b, t in zip(wanted, least, most, strict=True)):
            return None
        total = self.kept(sum(sizes))
        low, high = 0.0, 2.0  # below 1: share kept of what is above the floor; above 1: of the room to the ceiling
        for _ in range(60):
            share = (low + high) / 2
            kept = [
                min(t, max(b, b + share * (max(w, b) - b) if share <= 1 else w + (share - 1) * (t - min(w, t))))
                for w, b, t in zip(wanted, least, most, strict=True)
            ]
            low, high = (share, high) if sum(kept) < total else (low, share)
        whole = [math.floor(k) for k in kept]
        for index in sorted(range(len(kept)), key=lambda i: whole[i] - kept[i])[: max(0, total - sum(whole))]:
            whole[index] += whole[index] < most[index]
        return whole


def _matrices(point: Point, starts: Sequence[int]) -> int | Tensor:
    """Return the index of the first matrix of a point among all matrices, or the indices of a stack's matrices.

    Args:
        point: The point.
        starts: Index of the first matrix of each tensor.
    """
    if point.stack:
        return sent([starts[index] for index in point.stack], point.v.device)
    return starts[point.tensor] + point.piece.matrix


def one_of(sparsity: float | None, constraint: Constraint | None) -> Constraint:
    """Return the set given by a fraction of zeros or as an object; raise UserError unless exactly one is given."""
    if (sparsity is None) == (constraint is None):
        raise UserError(
            f"give sparsity (a fraction, such as 0.9) or constraint, one of the two; got sparsity={sparsity}, "
            f"constraint={constraint}"
        )
    if constraint is not None:
        check_set(constraint, "constraint")
    return constraint if constraint is not None else Unstructured(sparsity)


class _Seen(NamedTuple):
    """What a pass saw of a piece.

    Attributes:
        rows: Indices of its matrices.
        counts: Whether this process counts its entries.
        ends: The least and the largest score of each matrix, ``(matrices,)`` each.
        unweighted: Whether it has no F.
    """

    rows: slice | Tensor
    counts: bool
    ends: tuple[Tensor, Tensor]
    unweighted: bool


def _survivors(points: Points, seen: Sequence[_Seen], packed: Sequence[Tensor], matrices: int) -> list[float]:
    """Return how many entries of each matrix survive, −1 if all its scores are 0; and at last whether one has no F.

    Args:
        points: The points.
        seen: What the pass that made the masks saw of each piece.
        packed: The mask of each piece.
        matrices: How many there are.
    """
    survive = torch.zeros(matrices + 1, dtype=exact_dtype(points.device), device=points.device)
    speak = torch.zeros_like(survive)
    for piece, bits in zip(seen, packed, strict=True):
        if piece.counts:
            survive[piece.rows] += ones(bits, len(bits))
            speak[piece.rows] += (piece.ends[0] != 0) | (piece.ends[1] != 0)
    survive[-1] = any(piece.unweighted for piece in seen)
    speak[-1] = 1
    survive, speak = points.add(torch.stack([survive, speak]))
    return torch.where(speak > 0, survive, -1).tolist()


def _scales(points: Points, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Return the root mean square of √F v of each matrix, or 1 where that is 0; float32 ``(matrices,)``.

    Args:
        points: The points.
        starts: Index of the first matrix of each tensor.
        sizes: Entries of each matrix.
    """
    squares = torch.zeros(len(sizes), dtype=exact_dtype(points.device), device=points.device)
    for point in points.stacked():
        if point.part.counts:
            v, n = point.v.float(), point.piece.matrices
            each = v.square() if point.importance is None else (point.importance * v).mul_(v)  # cheaper than the root
            squares[rows_of(_matrices(point, starts), n)] += each.reshape(n, -1).sum(dim=1, dtype=squares.dtype)
    scales = (points.add(squares) / sent(sizes, points.device)).sqrt().float()
    return torch.where(scales > 0, scales, 1)
