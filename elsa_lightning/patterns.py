"""Recognises N:M patterns, N of every M neighbours along the input, in existing weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

USUAL = ((1, 4), (2, 8), (2, 4), (4, 8))  # the tightest first: 1:4 implies 2:8 and 2:4


@dataclass(frozen=True)
class Groups:
    """Counts of the groups of a pattern.

    Attributes:
        groups: Number of groups.
        violating: Number of groups with more weights than the pattern allows.
    """

    groups: int
    violating: int

    def __add__(self, other: Groups) -> Groups:
        return Groups(self.groups + other.groups, self.violating + other.violating)


def groups_of(kept: Tensor, length: int | None = None) -> dict[str, Groups]:
    """Return the groups of each usual pattern whose groups divide the rows.

    Args:
        kept: ``(..., in)``, True where a weight is not 0.
        length: Length of whole rows, if these are parts of rows that cut no group.
    """
    length = length or kept.shape[-1]
    found = {}
    for n, m in USUAL:
        if length % m == 0 and kept.shape[-1] % m == 0:
            weights = kept.reshape(*kept.shape[:-1], kept.shape[-1] // m, m).sum(dim=-1)
            found[f"{n}:{m}"] = Groups(weights.numel(), int(torch.count_nonzero(weights > n)))
    return found


def satisfied(violating: Mapping[str, float]) -> str | None:
    """Return the tightest of the usual patterns, such as ``2:4``, that no group violates, or None.

    Args:
        violating: Number of violating groups by pattern, without patterns that do not fit the shape.
    """
    return next((pattern for n, m in USUAL if violating.get(pattern := f"{n}:{m}") == 0), None)
