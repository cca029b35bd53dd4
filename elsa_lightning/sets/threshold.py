"""The exact largest entries of tensors that may be spread over processes.

Non-negative floats order as their bits do. Counting entries by their highest bits, then, inside the bin that holds
the k-th largest, by the next ones, finds the threshold exactly in three passes. Processes add their counts: what
they exchange grows with the number of bins, not with the tensors. Nothing of a tensor's size is kept from pass to
pass, and the result is the same for any sharding by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Sum = Callable[[Tensor], Tensor]

_ROUNDS = ((20, 11), (10, 10), (0, 10))  # lowest bit and number of bits of each pass over float32's 31
_MANY = 1024  # pools from which on narrower histograms and a pass more take less memory than these
_NARROW = ((23, 8), (15, 8), (7, 8), (0, 7))


class Scores(NamedTuple):
    """Local entries of a matrix, or of some matrices that follow each other; a matrix may come in several pieces.

    Attributes:
        score: What counts, non-negative float32 ``(matrices, n)``.
        tiebreak: What decides between equal scores, likewise.
        first: Index of the first matrix among all matrices.
        counts: Whether this process counts them: others may hold the same entries.
        order: Place of this process among those that hold parts of these matrices.
    """

    score: Tensor
    tiebreak: Tensor
    first: int
    counts: bool = True
    order: int = 0

    @property
    def rows(self) -> slice:
        """Their indices among all matrices."""
        return slice(self.first, self.first + len(self.score))


def largest(
    scores: Callable[[], Iterable[Scores]], pools: Tensor, kept: Tensor, add: Sum = lambda t: t, parts: int = 1
) -> Iterator[Tensor]:
    """Yield masks ``(matrices, n)`` of exactly ``kept`` largest entries in each pool.

    Equal scores go to the larger tiebreak, then to the earlier matrix, part and entry.

    Args:
        scores: Makes the entries anew for each pass.
        pools: Index of the pool that each matrix's entries compete in, ascending int64 ``(matrices,)``.
        kept: Entries that survive in each pool, int64 ``(pools,)``, at least 1 and at most its size.
        add: Sums a tensor over all processes.
        parts: Largest number of parts of a matrix.
    """
    score, places, equals = _kth_largest(lambda: ((s, order_bits(s.score), None) for s in scores()), pools, kept, add)
    if bool((equals == places).all()):
        for s in scores():
            yield order_bits(s.score) >= score[pools[s.rows], None]
        return

    def tied() -> Iterator[tuple[Scores, Tensor, Tensor]]:
        for s in scores():
            yield s, order_bits(s.tiebreak), order_bits(s.score) == score[pools[s.rows], None]

    tiebreak, places, _ = _kth_largest(tied, pools, places, add)
    found = torch.zeros(len(pools), parts, dtype=torch.int64, device=kept.device)
    for s, bits, ties in tied():
        if s.counts:
            found[s.rows, s.order] += (ties & (bits == tiebreak[pools[s.rows], None])).sum(dim=1)
    found = add(found)
    earlier = found.sum(dim=1).cumsum(0) - found.sum(dim=1)
    earlier -= earlier[torch.searchsorted(pools, torch.arange(len(kept), device=pools.device))][pools]
    free = (places[pools] - earlier)[:, None] - (found.cumsum(dim=1) - found)
    given = torch.zeros_like(earlier)
    for s, bits, ties in tied():
        mine = pools[s.rows, None]
        last = ties & (bits == tiebreak[mine])
        order = last.cumsum(dim=1) + given[s.rows, None]
        yield (
            (order_bits(s.score) > score[mine])
            | (ties & (bits > tiebreak[mine]))
            | (last & (order <= free[s.rows, s.order, None]))
        )
        given[s.rows] += last.sum(dim=1)


def largest_of_rows(score: Tensor, tiebreak: Tensor, kept: int) -> Tensor:
    """Return a mask of exactly ``kept`` largest entries of each row ``(..., n)``, all of which is at hand.

    Equal scores go to the larger tiebreak, then to the earlier entry.
    """
    order = order_bits(tiebreak).argsort(dim=-1, descending=True, stable=True)
    by_score = order_bits(score).gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    best = order.gather(-1, by_score[..., :kept])
    return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(-1, best, True)


def order_bits(key: Tensor) -> Tensor:
    """Return non-negative floats as integers of the same order; NaN comes above all."""
    return key.abs().view(torch.int32)  # abs for NaN's sign


def _kth_largest(
    keys: Callable[[], Iterable[tuple[Scores, Tensor, Tensor | None]]], pools: Tensor, k: Tensor, add: Sum
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k-th largest key of each pool, how many of its equals are among the k, and how many are.

    Args:
        keys: Makes the entries, their keys as integers, and which of them take part (None for all).
        pools: See :func:`largest`.
        k: Rank in each pool, from 1.
        add: Sums a tensor over all processes.
    """
    prefix: Tensor | None = None
    equals = k
    for shift, width in _ROUNDS if len(k) <= _MANY else _NARROW:
        counts = torch.zeros(len(k), 1 << width, dtype=torch.int64, device=k.device)
        for s, bits, among in keys():
            if s.counts:
                if prefix is not None:
                    inside = (bits >> (shift + width)) == prefix[pools[s.rows], None]
                    among = inside if among is None else among & inside
                counts.index_add_(0, pools[s.rows], _histogram(bits, among, shift, width))
        counts = add(counts)
        from_top = counts.flip(1).cumsum(1)
        place = (from_top >= k[:, None]).to(torch.uint8).argmax(dim=1, keepdim=True)
        bin_ = (1 << width) - 1 - place
        equals = counts.gather(1, bin_).squeeze(1)
        k = k - from_top.gather(1, place).squeeze(1) + equals
        upper = 0 if prefix is None else prefix << width
        prefix = (upper + bin_.squeeze(1)).to(torch.int32)
    assert prefix is not None
    return prefix, k, equals


def _histogram(bits: Tensor, among: Tensor | None, shift: int, width: int) -> Tensor:
    """Count the entries of each row by ``width`` bits from ``shift`` on."""
    rows = len(bits)
    bins = (bits >> shift).bitwise_and_((1 << width) - 1)
    if rows > 1:
        bins += torch.arange(rows, dtype=torch.int32, device=bits.device)[:, None] << width
    bins = bins.flatten() if among is None else bins[among]
    return torch.bincount(bins, minlength=rows << width).view(rows, -1)
