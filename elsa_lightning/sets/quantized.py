"""An integer grid with a scale per group of weights, inside another set: low-bit formats store it without loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from elsa_lightning.errors import UserError
from elsa_lightning.sets.base import Constraint, Point, Points, check_set
from elsa_lightning.sets.checks import check_whole, is_number

_LOWEST = {
    2: 0.25,
    3: 0.35,
    4: 0.5,
    8: 0.85,
}  # the lowest scale tried for so many bits, relative to max|v|/q
_CANDIDATES = 8
_FINE = 8  # bits during the ramp
_IN_CACHE = 1 << 16  # entries fitted at once on a CPU, so that they stay in its cache
_TINY = torch.finfo(torch.bfloat16).tiny


@dataclass(frozen=True)
class Quantized(Constraint):
    """Weights are integers from −(2^(bits−1) − 1) to 2^(bits−1) − 1 times the scale of their group, and in another set.

    With S' the other set and a scale s for each group of neighbours along the input, the projection is

        argmin_{s, z} Σᵢ Fᵢ (zᵢ − vᵢ)²,   z ∈ s · {−q, ..., q},  q = 2^(bits−1) − 1,

    over z with the support of Π_S'(v). Each entry goes to its nearest level. The scale is the best of 8, spaced evenly
    from max|v|/q of the group down to a fraction of it that depends on ``bits``, the largest one if errors are equal.
    An update tries only four: max|v|/q, the last scale, and that scale moved up and down by half the spacing of the
    eight; or four over the whole range if the last scale cannot fit, as at the first update. Scales are bfloat16
    numbers, which float32 and float16 hold exactly too.
    Groups lie as those of :class:`~elsa_lightning.NM`. Zero is a level, so zeros stay zeros; a group of zeros has scale
    1.

    Scales are chosen anew at every update, and as often in the frozen phase. In between they are fixed: each step is
    rounded to the grid, and the rounding error is remembered. During the ramp of the other set the grid has 8 bits.

    Args:
        bits: 2, 3, 4 or 8. The most negative integer of so many bits is not used.
        group_size: Weights that share a scale; None for all inputs of an output.
        inside: The other set; None for a grid without prescribed zeros.

    Raises:
        UserError: A value is out of range, or ``group_size`` does not divide the inputs of a tensor.
    """

    bits: int
    group_size: int | None = None
    inside: Constraint | None = None
    fixes_values = True

    def __post_init__(self) -> None:
        if not is_number(self.bits) or self.bits not in _LOWEST:
            raise UserError(f"bits must be one of {list(_LOWEST)}, got {self.bits!r}")
        if self.group_size is not None:
            check_whole("group_size", self.group_size, "a number of weights that share a scale, or None for whole rows")
        if self.inside is not None:
            check_set(self.inside, "inside")
        if self.inside is not None and self.inside.fixes_values:
            raise UserError(f"inside must be a set that leaves the values of kept weights free, got {self.inside}")

    # ------------------------------------------------------------------ the other set

    def _inside(self, names: Sequence[str]) -> list[int]:
        """Return the indices of the tensors in which the other set has zeros."""
        return [] if self.inside is None else [i for i, name in enumerate(names) if self.inside.covers(name)]

    def fitted(self, model: nn.Module) -> Quantized:
        """Fit the other set."""
        return self if self.inside is None else replace(self, inside=self.inside.fitted(model))

    def sized(self, shapes: Mapping[str, torch.Size], bytes_each: Mapping[str, float] | None = None) -> Quantized:
        """Size the other set by its tensors, whose entries take ``bits`` each."""
        if self.inside is None:
            return self
        names = list(shapes)
        mine = {names[index]: shapes[names[index]] for index in self._inside(names)}
        return replace(self, inside=self.inside.sized(mine, dict.fromkeys(mine, self.bits / 8))) if mine else self

    def relaxed(self, tightness: float) -> Quantized:
        """Relax the other set, with a grid of 8 bits until the ramp ends: rounding should not influence the mask."""
        inside = None if self.inside is None else self.inside.relaxed(tightness)
        return replace(self, bits=self.bits if tightness >= 1 else _FINE, inside=inside)

    def members(self, names: Sequence[str]) -> list[tuple[Constraint, list[int]]]:
        """Return the sets that the other set consists of, and a grid alone for the tensors that it leaves dense."""
        inside = self._inside(names)
        found: list[tuple[Constraint, list[int]]] = []
        if self.inside is not None and inside:
            theirs = self.inside.members([names[index] for index in inside])
            found = [(member, [inside[i] for i in indices]) for member, indices in theirs]
        rest = [index for index in range(len(names)) if index not in set(inside)]
        return [*found, (replace(self, inside=None), rest)] if rest else found

    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the masks of the other set; keep everything where there is none."""
        if self.inside is None:
            for point in points:
                yield torch.ones_like(point.v, dtype=torch.bool)
            return
        inside = self._inside(points.names)
        masks = self.inside.support(points.only(inside)) if inside else iter(())
        for point in points:
            yield next(masks) if point.tensor in inside else torch.ones_like(point.v, dtype=torch.bool)
        next(masks, None)

    def grain_of(self, name: str) -> tuple[int, int]:
        """Return a block that is whole groups of the grid and whole blocks of the other set."""
        if self.inside is None or not self.inside.covers(name):
            return (1, self.group_size or 0)
        rows, columns = self.inside.grain_of(name)
        return (rows, math.lcm(columns, self.group_size or 0))

    def check(self, shapes: Mapping[str, torch.Size], transposed: Collection[str] = ()) -> None:
        """Raise UserError if a group would be cut, or the other set is not possible for its tensors."""
        super().check(shapes, transposed)
        inputs = {name: shape[-2 if name in transposed else -1] for name, shape in shapes.items()}
        for name, n in inputs.items():
            if self.group_size is not None and n % self.group_size:
                common = math.gcd(*inputs.values())
                sizes = [size for size in range(common, 7, -1) if common % size == 0] or [common]
                raise UserError(
                    f"{name} has {n} inputs, which is no multiple of group_size={self.group_size}; of all constrained "
                    f"tensors these are: {', '.join(map(str, sizes))}. Take one of them, or null for whole rows, or "
                    f"leave the tensor out with ignore=['{name}$']"
                )
        names = list(shapes)
        if self.inside is not None and (mine := [names[index] for index in self._inside(names)]):
            self.inside.check({name: shapes[name] for name in mine}, [name for name in mine if name in transposed])

    # ------------------------------------------------------------------ the grid

    @property
    def largest(self) -> int:
        """q, the largest integer."""
        return int(2 ** (self.bits - 1)) - 1

    def shared(self, name: str) -> tuple[int, int]:
        """Return the size of a group."""
        return (1, self.group_size or 0)

    def _groups(self, t: Tensor, point: Point) -> tuple[Tensor, int]:
        """Return entries reshaped to groups, and the dimension along which the entries of a group lie."""
        if point.transposed:
            rows = self.group_size or t.shape[0] // point.piece.matrices
            return t.reshape(-1, rows, t.shape[-1]), 1
        return t.reshape(t.shape[0], -1, self.group_size or t.shape[-1]), 2

    def fit(self, v: Tensor, point: Point) -> Tensor:
        """Return the scale of each group that has the least error of those tried."""
        groups, dim = self._groups(v, point)
        weight = None if point.importance is None else self._groups(point.importance, point)[0]
        last = None if point.numbers is None else point.numbers.unsqueeze(dim)
        at_once = max(1, len(groups) if v.device.type != "cpu" else _IN_CACHE // max(1, groups[:1].numel()))
        found = []
        for start in range(0, max(1, len(groups)), at_once):
            rows = slice(start, start + at_once)
            costs, former = (None if t is None else t[rows] for t in (weight, last))
            found.append(self._fit(groups[rows], costs, former, dim))
        return torch.cat(found).squeeze(dim)

    def _fit(self, v: Tensor, weight: Tensor | None, last: Tensor | None, dim: int) -> Tensor:
        """Return the scales of some groups, whose entries lie along ``dim``; the result has size 1 there."""
        size = v.abs().to(torch.promote_types(v.dtype, torch.float32))
        largest = size.amax(dim=dim, keepdim=True)
        size = size.div_(largest + (largest == 0))  # else squares of small entries would underflow
        if weight is not None:
            weight = weight.to(size.dtype)
            most = weight.amax(dim=dim, keepdim=True)
            none = (most == 0).to(most.dtype)  # then all entries weigh the same
            weight = (weight / (most + none)).add_(none)
        scales = self._tried(largest, last).bfloat16().to(largest.dtype)
        finer = largest / scales.clamp_min(_TINY)  # largest entry in units of a level
        errors = torch.empty_like(finer)
        exact, level = torch.empty_like(size), torch.empty_like(size)
        for share, error in zip(finer, errors, strict=True):
            torch.mul(size, share, out=exact)
            torch.round(exact, out=level).clamp_(max=self.largest).sub_(exact).square_()
            torch.sum(level if weight is None else level.mul_(weight), dim=dim, keepdim=True, out=error)
        errors.div_(finer.square_()).masked_fill_(scales < _TINY, torch.inf)
        least, best = errors.min(dim=0)
        return scales.gather(0, best[None])[0].masked_fill_(least == torch.inf, 1)

    def _tried(self, largest: Tensor, last: Tensor | None) -> Tensor:
        """Return the scales to try: eight, or four after an update, around its scale if that still fits."""
        whole, low = largest / self.largest, _LOWEST[self.bits]
        shares = torch.linspace(1, low, _CANDIDATES if last is None else _CANDIDATES // 2).tolist()
        scales = torch.stack([whole * share for share in shares])
        if last is None:
            return scales
        last, step = last.to(whole.dtype), (1 - low) / (_CANDIDATES - 1) / 2
        fits = (last >= whole * (low / 2)) & (last <= whole * 1.5)  # not after a change of bits, or at first
        return torch.where(fits, torch.stack([whole, last * (1 + step), last, last * (1 - step)]), scales)

    def values(self, v: Tensor, point: Point) -> Tensor:
        """Return the nearest level of each entry."""
        assert point.numbers is not None
        groups, dim = self._groups(v, point)
        scale = point.numbers.to(v.dtype).unsqueeze(dim)
        return (groups / scale).round_().clamp_(-self.largest, self.largest).mul_(scale).view(v.shape)

    def resolution(self, point: Point) -> Tensor:
        """Return the scale of each entry's group: the distance of neighbouring levels."""
        assert point.numbers is not None
        groups, dim = self._groups(point.v, point)
        return point.numbers.unsqueeze(dim).expand(groups.shape).reshape(point.v.shape)
