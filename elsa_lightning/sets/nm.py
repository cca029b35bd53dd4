"""N:M sparsity: N of every M neighbours along the input are kept, the pattern of sparse matrix units."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.sets.base import Constraint, Points, distance
from elsa_lightning.sets.checks import check_whole
from elsa_lightning.sets.threshold import order_bits
from elsa_lightning.sets.unstructured import AT_ONCE


@dataclass(frozen=True)
class NM(Constraint):
    """At most ``n`` of every ``m`` neighbouring weights of one output may be non-zero.

    The projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over such z: of each group it keeps the ``n`` largest Fᵢ vᵢ², unchanged.
    Ties go to the larger magnitude, then to the lower index. Groups begin at the multiples of ``m`` along the input:
    for weights ``(out, in)`` that is along rows, for GPT-2's Conv1D ``(in, out)`` along columns, for kernels along the
    entries that one output multiplies.

    Args:
        n: Weights that survive in each group.
        m: Weights in a group.

    Raises:
        UserError: Not 1 ≤ n ≤ m, or m does not divide the inputs of a tensor.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_whole("m", self.m, "how many weights a group has")
        if not isinstance(self.n, int) or isinstance(self.n, bool) or not 1 <= self.n <= self.m:
            raise UserError(f"n must be from 1 to m, got n={self.n!r}, m={self.m}; 2:4 is n=2, m=4")

    def grain_of(self, name: str) -> tuple[int, int]:
        """Return one group."""
        return (1, self.m)

    def check(self, shapes: Mapping[str, torch.Size], transposed: Collection[str] = ()) -> None:
        """Raise UserError if a group would be cut."""
        super().check(shapes, transposed)
        for name, shape in shapes.items():
            inputs = shape[-2 if name in transposed else -1]
            if inputs % self.m:
                raise UserError(
                    f"{name} has {inputs} inputs, which is no multiple of m={self.m}: leave it out with "
                    f"ignore=['{name}$'], or choose an m that divides them"
                )

    def relaxed(self, tightness: float) -> NM:
        """Return the set with a share of zeros that grows from 70 %, or less if the target is less, to the target."""
        zeros = (self.m - self.n) / self.m
        start = min(zeros, AT_ONCE)
        now = start + (zeros - start) * tightness
        return replace(self, n=self.m - int(now * self.m + 1e-9))

    def support(self, points: Points) -> Iterator[Tensor]:
        """Yield the masks."""
        for point in points:
            score, magnitude = (order_bits(t) for t in (distance(point.v, point.importance), point.v.abs().float()))
            if point.transposed:
                columns = point.v.shape[-1]
                score, magnitude = (t.reshape(-1, self.m, columns).transpose(1, 2) for t in (score, magnitude))
                kept = self._kept(score, magnitude)
                yield kept.transpose(1, 2).reshape(point.v.shape)
            else:
                yield self._kept(score.reshape(-1, self.m), magnitude.reshape(-1, self.m)).view(point.v.shape)

    def _kept(self, score: Tensor, magnitude: Tensor) -> Tensor:
        """Return a mask of the first ``n`` of each group ``(..., m)``, ordered by score, magnitude and place."""
        rank = torch.zeros(score.shape, dtype=torch.int16, device=score.device)
        place = torch.arange(self.m, device=score.device)
        for j in range(self.m):
            other, size = score[..., j : j + 1], magnitude[..., j : j + 1]
            rank += (other > score) | ((other == score) & ((size > magnitude) | ((size == magnitude) & (place > j))))
        return rank < self.n
