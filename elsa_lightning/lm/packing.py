"""A stream of tokens as sequences: cut, shuffled, distributed over processes, and resumed at the very next sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Item = Tensor | dict[str, Tensor]


class PackedTokens(Dataset[Item]):
    """A stream of tokens cut into sequences of equal length; an incomplete last one is dropped.

    If some tokens are only context, sequences in which nothing is scored are left out.

    Args:
        tokens: Token ids ``(n,)``, may be memory-mapped; int64 if some tokens are only context, stored as ``~id``.
        seq_len: Tokens in a sequence.
        bos: Token at the start of every sequence, which counts as one of its tokens; None for none.
        most: Take at most so many sequences; None takes all.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, bos: int | None = None, most: int | None = None) -> None:
        self.tokens, self.seq_len, self.bos = tokens, seq_len, bos
        self.stride = seq_len - (bos is not None)
        self.has_context = tokens.dtype == np.int64
        self.places: Sequence[int] = range(len(tokens) // self.stride)
        if self.has_context:  # the first token of a sequence is never predicted
            cut = tokens[: len(self.places) * self.stride].reshape(-1, self.stride)
            self.places = np.flatnonzero((cut[:, bos is None :] >= 0).any(axis=1)).tolist()
        self.places = self.places[:most]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        """Return a sequence: token ids, int64 ``(seq_len,)``, or a dict with labels if some tokens are context."""
        start = self.places[index] * self.stride
        ids = torch.from_numpy(self.tokens[start : start + self.stride].astype(np.int64))
        if self.bos is not None:
            ids = torch.cat([torch.tensor([self.bos]), ids])
        if not self.has_context:
            return ids
        return {"input_ids": torch.where(ids < 0, ~ids, ids), "labels": torch.where(ids < 0, -100, ids)}


class EvaluationShare(Dataset[dict[str, Tensor]]):
    """Every ``world``-th sequence from ``rank`` on; all processes get equally many, and none is scored twice.

    A process whose sequences run out early gets one more, whose labels exclude it from scoring.
    """

    def __init__(self, data: PackedTokens, world: int, rank: int) -> None:
        self.data, self.world, self.rank = data, world, rank

    def __len__(self) -> int:
        return -(-len(self.data) // self.world)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return token ids and labels of a sequence: int64 ``(seq_len,)``."""
        place = index * self.world + self.rank
        item = self.data[min(place, len(self.data) - 1)]
        scored = item if isinstance(item, dict) else {"input_ids": item, "labels": item}
        if place >= len(self.data):
            scored = {**scored, "labels": torch.full_like(scored["labels"], -100)}
        return scored


class ResumableSampler(DistributedSampler[Item]):
    """A seeded shuffle per epoch that can skip the samples that an interrupted epoch already used."""

    skip = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)


class ResumableLoader(DataLoader[Item]):
    """A DataLoader whose state is its position in the epoch; Lightning saves and restores it.

    Batches are counted when they are handed out, so workers that read ahead do not affect the count.

    Attributes:
        limit: Called for the most batches that an epoch takes of this loader, such as ``limit_train_batches``; None
            where an epoch takes all.
    """

    _given = 0
    _skip = 0
    limit: Callable[[], float] | None = None

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of this epoch were handed out; at its end 0, as the next epoch begins there."""
        used = len(self) if self.limit is None else min(len(self), self.limit())
        return {"batches": self._given % max(1, int(used))}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Make the next epoch start after the batches that ``state_dict`` counts."""
        self._skip = state_dict["batches"]

    def __iter__(self) -> Iterator[Item]:  # type: ignore[override]
        self._given, self._skip = self._skip, 0
        assert self.batch_size is not None
        if self.generator is None:  # else the workers' seed is drawn from the global state, which changes dropout
            self.generator = torch.Generator()
        batches: Iterator[Item]
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.skip = self._given * self.batch_size
            batches = super().__iter__()
        else:  # overfit_batches has put one in its place that keeps the order of the data
            batches = islice(super().__iter__(), self._given, None)
        for batch in batches:
            self._given += 1
            yield batch
