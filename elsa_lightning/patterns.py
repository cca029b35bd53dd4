"""N of every M neighbours along the input, recognised in weights that somebody else pruned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

USUAL = ((1, 4), (2, 8), (2, 4), (4, 8))  # the tightest first: who satisfies 1:4 satisfies 2:8 and 2:4


def violations(kept: Tensor, n: int, m: int) -> Tensor:
    """Return how many groups of ``m`` neighbours have more than ``n`` that are kept.

    Args:
        kept: ``(..., in)``, True where a weight is not 0; ``m`` divides ``in``.
        n: Weights that a group may have.
        m: Entries of a group.
    """
    groups = kept.reshape(*kept.shape[:-1], kept.shape[-1] // m, m).sum(dim=-1)
    return torch.count_nonzero(groups > n)


def satisfied(found: Mapping[str, float]) -> str | None:
    """Return the tightest of the usual patterns, such as ``2:4``, that no group violates, or None.

    Args:
        found: Violations by pattern; patterns that cannot be had of a shape are not in it.
    """
    return next((pattern for n, m in USUAL if found.get(pattern := f"{n}:{m}") == 0), None)
