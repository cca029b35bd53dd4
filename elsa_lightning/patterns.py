"""N of every M neighbours along the input, recognised in weights that somebody else pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

USUAL = ((1, 4), (2, 8), (2, 4), (4, 8))  # the tightest first: who satisfies 1:4 satisfies 2:8 and 2:4


@dataclass(frozen=True)
class Groups:
    """Groups of neighbours.

    Attributes:
        groups: How many there are.
        violating: Those that have more weights than the pattern allows.
    """

    groups: int
    violating: int

    def __add__(self, other: Groups) -> Groups:
        return Groups(self.groups + other.groups, self.violating + other.violating)


def groups_of(kept: Tensor, length: int | None = None) -> dict[str, Groups]:
    """Return the groups of each of the usual patterns that rows can be cut into.

    Args:
        kept: ``(..., in)``, True where a weight is not 0.
        length: Of whole rows, where these are parts of them that cut no group.
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
        violating: Groups that do, by pattern; one that cannot be had of a shape is not in it.
    """
    return next((pattern for n, m in USUAL if violating.get(pattern := f"{n}:{m}") == 0), None)
