"""The exact largest entries of tensors that may be spread over processes.

The k-th largest score is found by radix selection, without sorting or gathering. Non-negative floats have the same
order as their bits: counting entries by their highest bits, then, within the bin that holds the k-th largest, by the
next bits, finds the threshold exactly in three passes. Two passes suffice if the threshold is near the one extrapolated
from the last two searches, as it usually is between updates. Among entries that equal the threshold the larger
magnitude and then the first place decides, in a further pass over these tensors alone. On a CPU the first pass, or the
extrapolated threshold in its stead, is followed by a single pass: it stores a bit for each entry that is certainly
kept, and the few entries that may be the threshold.

If one GPU holds everything, ``torch.topk`` finds the threshold of one matrix at a time instead.

Processes add up their counts, so the traffic between them grows with the number of bins, not with the tensors. The
result is the same for any sharding by rows and for any guess.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from elsa_lightning.layout.lowbit import masked
from elsa_lightning.layout.rows import on_host

Sum = Callable[[Tensor], Tensor]
Making = Callable[[Collection[int] | None], "Iterable[Scores]"]

_ROUNDS = ((20, 11), (10, 10), (0, 10))  # lowest bit and number of bits of each pass over float32's 31
_MANY = 1024  # with more pools, narrower histograms (_NARROW) and one more pass save memory
_NARROW = ((23, 8), (15, 8), (7, 8), (0, 7))
_NEAR = ((12, 11), (0, 12))  # rounds around a guess: bins that cover at least 2/3 to 3/2 of it
_CLOSE = 21  # log2 of the number of keys that count as close to a guess: at least 7/8 to 9/8 of it
_INSIDE = ((10, 11), (0, 10))  # rounds within these keys
_INSIDE_NARROW = ((14, 7), (7, 7), (0, 7))
_ABOVE_ALL = 0x7FFFFFFF  # a key above all others: no arithmetic yields a number with these bits
HELD = 1 << 26  # entries of the largest matrix whose scores a GPU holds at once
_FEW, _FEW_ENOUGH = 1 / 4, 1 << 16  # largest share, and in any case allowed number, of entries kept from a pass


def rows_of(first: int | Tensor, matrices: int) -> slice | Tensor:
    """Return the indices of so many matrices among all, given the first of consecutive ones or the index of each."""
    return first if isinstance(first, Tensor) else slice(first, first + matrices)


class Scores(NamedTuple):
    """Scores of the local entries of one or some consecutive matrices; a matrix may come in several pieces.

    Attributes:
        score: Scores, compared by magnitude, float32 ``(matrices, n)``.
        tiebreak: Decides between equal scores, also by magnitude, in the same shape.
        first: Index of the first matrix among all matrices, or the index of each, int64 ``(matrices,)``.
        counts: Whether this process counts these entries: others may hold the same ones.
        order: Index of this process among those that hold parts of these matrices.
    """

    score: Tensor
    tiebreak: Tensor
    first: int | Tensor
    counts: bool = True
    order: int = 0

    @property
    def rows(self) -> slice | Tensor:
        """The indices of the matrices among all."""
        return rows_of(self.first, len(self.score))


_Entries = tuple[Scores, Tensor, Tensor | None]  # entries, their integer keys, and which take part (None for all)
_Keys = Callable[[], Iterator[_Entries]]


def largest(
    scores: Making, pools: Tensor, kept: Tensor, add: Sum = lambda t: t, parts: int = 1,
    guesses: dict[Hashable, Tensor] | None = None, of: Hashable = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield masks ``(matrices, n)`` of exactly ``kept`` largest entries in each pool.

    Equal scores go to the larger tiebreak, then to the earlier matrix, part and entry.

    Args:
        scores: Computes the entries anew for each pass; given indices of matrices, it may leave out all others.
        pools: Index of the pool that each matrix's entries compete in, ascending int64 ``(matrices,)``.
        kept: Entries that survive in each pool, int64 ``(pools,)``, at least 1 and at most its size.
        add: Sums a tensor over all processes.
        parts: Largest number of parts of a matrix.
        guesses: The thresholds of the last two searches, updated by this one. They save passes, and never change the
            result.
        of: Identifies the search, as a key of ``guesses``.
    """
    former = None if guesses is None else guesses.get(of)
    guess = None if former is None else (2 * former[0] - former[1]).clamp_min(0)
    (score, places, equals), few = _threshold(scores, pools, kept, add, guess)
    if guesses is not None:
        guesses[of] = torch.stack([score, score if former is None else former[0]])
    unclear = equals != places

    making: Making = scores if few is None else lambda _: [close.scores for close in few]
    if bool(unclear.any()):
        masks = _largest_of_equals(making, pools, score, places, unclear, add, parts)
    else:
        masks = (_at_least(order_bits(s.score), score[pools[s.rows], None]) for s in making(None))
    if few is None:
        yield from masks
    else:
        for mask, close in zip(masks, few, strict=True):  # strict: it runs masks to its end, where others communicate
            yield close.whole(mask)


def _largest_of_equals(
    scores: Making, pools: Tensor, score: Tensor, places: Tensor, unclear: Tensor, add: Sum, parts: int
) -> Iterator[Tensor]:
    """Yield the masks where not all entries that equal a threshold survive.

    Args:
        scores: As in :func:`largest`, like ``pools``, ``add`` and ``parts``.
        pools: Likewise.
        score: The threshold of each pool.
        places: How many entries equal to it survive.
        unclear: The pools in which not all of these survive.
        add: Likewise.
        parts: Likewise.
    """
    matrices = [index for index, yes in enumerate(unclear[pools].tolist()) if yes]

    def equal_ones() -> Iterator[_Entries]:
        for s in scores(matrices):
            yield s, order_bits(s.tiebreak), order_bits(s.score) == score[pools[s.rows], None]

    tiebreak, places, _ = _kth_largest(equal_ones, pools, places, add)
    tiebreak = torch.where(unclear, tiebreak, -1)  # in other pools all entries equal to the threshold stay
    found = torch.zeros(len(pools), parts, dtype=torch.int64, device=pools.device)
    for s, bits, equal in equal_ones():
        if s.counts and equal is not None:
            found[s.rows, s.order] += (equal & (bits == tiebreak[pools[s.rows], None])).sum(dim=1)
    found = add(found)
    earlier = found.sum(dim=1).cumsum(0) - found.sum(dim=1)
    earlier -= earlier[torch.searchsorted(pools, torch.arange(len(score), device=pools.device))][pools]
    free = (places[pools] - earlier)[:, None] - (found.cumsum(dim=1) - found)
    given = torch.zeros_like(earlier)
    among = set(matrices)
    for s in scores(None):
        mine, bits = pools[s.rows, None], order_bits(s.score)
        if not isinstance(s.first, Tensor) and among.isdisjoint(range(s.first, s.first + len(bits))):
            yield _at_least(bits, score[mine])
            continue
        equal, ties_of = bits == score[mine], order_bits(s.tiebreak)
        last = equal & (ties_of == tiebreak[mine])
        order = last.cumsum(dim=1) + given[s.rows, None]
        yield (
            (bits > score[mine])
            | (equal & (ties_of > tiebreak[mine]))
            | (last & (order <= free[s.rows, s.order, None]))
        )
        given[s.rows] += last.sum(dim=1)


def largest_of_each(scores: Making, kept: Tensor) -> Iterator[Tensor]:
    """Yield the masks of :func:`largest` if each matrix is a pool of its own and one process holds all of it.

    Scores are computed once, and held for one matrix, or one batch of matrices, at a time.

    Args:
        scores: As in :func:`largest`.
        kept: Entries that survive in each matrix, int64 ``(matrices,)``, on the host.
    """
    held: list[Scores] = []
    for s in scores(None):
        if held and not (isinstance(s.first, int) and s.first == held[0].first):
            yield from _of_one(held, kept)
            held = []
        if isinstance(s.first, int) and len(s.score) == 1:  # maybe only a piece of a matrix
            held.append(s)
            continue
        pools, ranks = torch.arange(len(s.score)), kept[s.rows.cpu() if isinstance(s.rows, Tensor) else s.rows]
        alone, device = s._replace(first=0), s.score.device
        yield from largest(lambda _, alone=alone: [alone], pools.to(device), ranks.to(device))  # type: ignore[misc]
    if held:
        yield from _of_one(held, kept)


def _of_one(pieces: Sequence[Scores], kept: Tensor) -> Iterator[Tensor]:
    """Yield the masks of all pieces of one matrix."""
    assert isinstance(pieces[0].first, int)
    bits, k = torch.cat([order_bits(s.score)[0] for s in pieces]), int(kept[pieces[0].first])
    n = len(bits)
    if 2 * k <= n:
        threshold = bits.topk(k, sorted=False).values.min()
    else:  # the k-th largest is the (n − k + 1)-th smallest: fewer entries to find
        threshold = bits.topk(n - k + 1, largest=False, sorted=False).values.max()
    mask = bits > threshold
    equals, places = (bits == threshold).nonzero().squeeze(1), k - int(mask.sum())
    if places < len(equals):
        ties = order_bits(torch.cat([s.tiebreak[0] for s in pieces])[equals])
        equals = equals[ties.argsort(descending=True, stable=True)[:places]]
    mask[equals] = True
    yield from (part[None] for part in torch.split(mask, [s.score.shape[1] for s in pieces]))


def largest_of_rows(score: Tensor, tiebreak: Tensor, kept: int) -> Tensor:
    """Return a mask of exactly ``kept`` largest entries of each whole row ``(..., n)``.

    Equal scores go to the larger tiebreak, then to the earlier entry.
    """
    order = order_bits(tiebreak).argsort(dim=-1, descending=True, stable=True)
    by_score = order_bits(score).gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    best = order.gather(-1, by_score[..., :kept])
    return torch.zeros(score.shape, dtype=torch.bool, device=score.device).scatter_(-1, best, True)


def order_bits(key: Tensor) -> Tensor:
    """Return the magnitudes of floats as new integers in the same order, with NaN above all."""
    return key.abs().view(torch.int32)


_Found = tuple[Tensor, Tensor, Tensor]  # the k-th largest key, how many equal to it are among the k, how many in all


class _Close(NamedTuple):
    """What a pass on a CPU stores of a piece: enough to make its mask, if the threshold is close to the guess.

    Attributes:
        scores: The entries close to the guess, left-aligned in each matrix and padded with ``_ABOVE_ALL``.
        among: True for these entries, False for padding, ``(matrices, most of a matrix)``.
        found: Their indices in the flattened piece.
        above: Packed bits: which entries of the piece are above the close ones.
        shape: Shape of the piece.
    """

    scores: Scores
    among: Tensor
    found: numpy.ndarray
    above: numpy.ndarray
    shape: torch.Size

    @classmethod
    def of(cls, s: Scores, close: numpy.ndarray, above: numpy.ndarray) -> _Close:
        """Store a piece, given which of its entries are close and which above."""
        found = numpy.flatnonzero(close)
        counts = numpy.array([len(found)] if len(close) == 1 else [numpy.count_nonzero(row) for row in close])
        among = numpy.arange(counts.max(initial=0)) < counts[:, None]

        def taken(t: Tensor) -> Tensor:
            some = t.numpy().take(found)
            if len(among) == 1:
                return torch.from_numpy(some[None])
            filled = numpy.full(among.shape, _ABOVE_ALL, dtype=numpy.int32).view(numpy.float32)
            filled[among] = some
            return torch.from_numpy(filled)

        kept = s._replace(score=taken(s.score), tiebreak=taken(s.tiebreak))
        return cls(kept, torch.from_numpy(among), found.astype(numpy.int32), numpy.packbits(above), s.score.shape)

    def whole(self, mask: Tensor) -> Tensor:
        """Return the mask of the piece, given the mask of its close entries."""
        bits = numpy.unpackbits(self.above, count=self.shape.numel())
        bits[self.found] = mask.numpy()[0] if len(mask) == 1 else mask.numpy()[self.among.numpy()]
        return torch.from_numpy(bits).view(torch.bool).view(self.shape)


def _threshold(
    scores: Making, pools: Tensor, k: Tensor, add: Sum, guess: Tensor | None
) -> tuple[_Found, list[_Close] | None]:
    """Return the k-th largest score of each pool, and the close entries of each piece if a pass stored them, else None.

    Args:
        scores: As in :func:`largest`, like ``pools`` and ``add``.
        pools: Likewise.
        k: Rank in each pool, from 1.
        add: Likewise.
        guess: A key for each pool that may be near the threshold.
    """

    def keys() -> Iterator[_Entries]:
        for s in scores(None):
            yield s, order_bits(s.score), None

    guess = guess if guess is not None and len(guess) == len(k) else None
    if not on_host(k):
        found = None
        if guess is not None and len(k) <= _MANY:
            (shift, width), _ = _NEAR
            found = _narrow_down(keys, pools, k, add, _NEAR, (guess >> shift) - (1 << (width - 1)))
        return _kth_largest(keys, pools, k, add) if found is None else found, None
    if guess is not None:
        found, few = _among_close(scores, pools, k, add, guess)
        if found is not None:
            return found, few
    first = _ROUNDS[:1] if len(k) <= _MANY else _NARROW[:2]
    around = _narrow_down(keys, pools, k, add, first, None)
    assert around is not None
    found, few = _among_close(scores, pools, k, add, around[0] + (1 << (first[-1][0] - 1)))
    assert found is not None
    return found, few


def _kth_largest(keys: _Keys, pools: Tensor, k: Tensor, add: Sum) -> _Found:
    """Return the k-th largest key of each pool, without a guess; the arguments are those of :func:`_narrow_down`."""
    found = _narrow_down(keys, pools, k, add, _ROUNDS if len(k) <= _MANY else _NARROW, None)
    assert found is not None
    return found


def _among_close(
    scores: Making, pools: Tensor, k: Tensor, add: Sum, guess: Tensor
) -> tuple[_Found | None, list[_Close] | None]:
    """Return the result of :func:`_threshold` in one pass; None for the keys if one is not close to its guess.

    If too many entries are close, they are not stored (None) but computed anew. The arguments are those of
    :func:`_threshold`.
    """
    rounds = _INSIDE if len(k) <= _MANY else _INSIDE_NARROW
    low = ((guess - (1 << (_CLOSE - 1))).clamp_min(0) >> rounds[0][0]) << rounds[0][0]

    def sides(s: Scores) -> numpy.ndarray:
        """Return 0 where a key is close, > 0 above, < 0 below: numpy is several times as fast as torch here."""
        side: numpy.ndarray = order_bits(s.score).numpy()
        side -= low[pools[s.rows], None].numpy()
        side >>= _CLOSE
        return side

    few: list[_Close] | None = []  # None as soon as there are too many
    above, seen, held = torch.zeros_like(k), 0, 0
    for s in scores(None):
        side = sides(s)
        over, close = side > 0, side == 0
        if s.counts:
            above.index_add_(0, pools[s.rows], torch.tensor([int(numpy.count_nonzero(row)) for row in over]))
        if few is None:
            continue
        few.append(_Close.of(s, close, over))
        seen, held = seen + side.size, held + few[-1].among.numel()
        if held > max(_FEW * seen, _FEW_ENOUGH):
            few = None

    def keys() -> Iterator[_Entries]:
        for close in few or ():
            yield close.scores, order_bits(close.scores.score), close.among
        for s in scores(None) if few is None else ():
            yield s, order_bits(s.score), torch.from_numpy(sides(s) == 0)

    return _narrow_down(keys, pools, k - add(above), add, rounds, low >> rounds[0][0]), few


def _at_least(bits: Tensor, threshold: Tensor) -> Tensor:
    """Return ``bits >= threshold`` of non-negative integers, faster than torch on a CPU; ``bits`` are overwritten."""
    if not on_host(bits):
        return bits >= threshold
    return torch.sub(threshold - 1, bits, out=bits).bitwise_right_shift_(31).to(torch.bool)


def _narrow_down(
    keys: _Keys, pools: Tensor, k: Tensor, add: Sum, rounds: tuple[tuple[int, int], ...], first: Tensor | None
) -> _Found | None:
    """Return the k-th largest key of each pool, or None if one is not in the bins of the first round.

    If the last round does not reach bit 0, the key returned is the least of the bin that holds the k-th largest.

    Args:
        keys: Yields the entries, their integer keys, and which of them take part (None for all).
        pools: See :func:`largest`.
        k: Rank in each pool, from 1.
        add: Sums a tensor over all processes.
        rounds: For each round the lowest bit that counts and log2 of the number of bins; the bins of a round divide one
            bin of the round before.
        first: The lowest bin of the first round in each pool; None if the bins cover all keys from 0.
    """
    base, equals, places = first, k, k
    for index, (shift, width) in enumerate(rounds):
        counts = torch.zeros(len(k), (1 << width) + 1, dtype=torch.int64, device=k.device)  # and a bin of all above
        for s, bits, among in keys():
            if s.counts:
                mine = pools[s.rows]
                found = _histogram(bits, among, None if base is None else base[mine, None], shift, width)
                counts.index_add_(0, mine, found[:, 1:])
        from_top = add(counts).flip(1).cumsum(1)
        place = (from_top >= k[:, None]).to(torch.uint8).argmax(dim=1, keepdim=True)
        if index == 0 and first is not None and bool((place == 0).any()):
            return None
        equals = counts.gather(1, (1 << width) - place).squeeze(1)
        places = k - from_top.gather(1, place).squeeze(1) + equals
        at = ((1 << width) - place).squeeze(1) if base is None else base + ((1 << width) - place).squeeze(1)
        after = rounds[index + 1][0] if index + 1 < len(rounds) else 0
        base = (at << (shift - after) if shift > after else at).to(torch.int32)
    assert base is not None
    return base, places, equals


def _histogram(bits: Tensor, among: Tensor | None, base: Tensor | None, shift: int, width: int) -> Tensor:
    """Count the entries of each row by their bits from ``shift`` on: below ``base``, in 2^width bins, and above these.

    Entries that do not take part count as below: selecting the others would make the host wait for a GPU. ``bits`` are
    overwritten.
    """
    rows, bins = len(bits), 1 << width
    found = bits.bitwise_right_shift_(shift) if shift else bits
    found = found.add_(1) if base is None else found.sub_(base - 1).clamp_(0, bins + 1)
    found = found if among is None else masked(found, among)
    if rows > 1:
        found += torch.arange(rows, dtype=torch.int32, device=bits.device)[:, None] * (bins + 2)
    size = rows * (bins + 2)
    if bits.is_cuda and not torch.are_deterministic_algorithms_enabled():  # bincount waits for min and max
        return torch.histc(found, bins=size, min=0, max=size).view(rows, -1).to(torch.int64)
    return torch.bincount(found.flatten(), minlength=size).view(rows, -1)
