"""Projections Π_S(v) in the norm of the importance: which entries stay. Pure functions, a mask each."""

from __future__ import annotations

import torch
from torch import Tensor

from elsa_lightning.sets.threshold import Scores, largest


def unstructured(v: Tensor, importance: Tensor | None, kept: int) -> Tensor:
    """Return the support of argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over z with ``kept`` non-zeros in each matrix.

    The minimiser keeps the entries with the largest Fᵢ vᵢ², unchanged. Equal scores go to the larger
    magnitude, then to the lower index, so that exactly ``kept`` survive.

    Args:
        v: ``(out, in)``, or ``(experts, out, in)`` with one projection an expert.
        importance: F, of the shape of ``v``, non-negative; None means 1.
        kept: Entries that survive in each matrix.

    Returns:
        Mask of the shape of ``v``, True where an entry is kept.
    """
    size = v.shape[-2] * v.shape[-1]
    if kept <= 0 or kept >= size:
        return torch.full_like(v, kept > 0, dtype=torch.bool)
    score, magnitude = distance(v, importance).view(-1, size), v.abs().float().view(-1, size)
    pools = torch.arange(len(score), device=v.device)
    (mask,) = largest(lambda: [Scores(score, magnitude, 0)], pools, torch.full_like(pools, kept))
    return mask.view(v.shape)


def distance(v: Tensor, importance: Tensor | None) -> Tensor:
    """Return √F |v| in float32, whose square is what zeroing each entry costs; it has the range of v."""
    return v.abs().float() if importance is None else (v.abs() * importance.sqrt()).float()
