"""Projections Π_S(v) in the norm of the importance: which entries stay. Pure functions, a mask each."""

from __future__ import annotations

import torch
from torch import Tensor


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
    matrices = v.reshape(-1, v.shape[-2] * v.shape[-1])
    magnitude = matrices.abs()
    score = magnitude if importance is None else magnitude.square() * importance.reshape(magnitude.shape)
    return _largest(score, magnitude, kept).view(v.shape)


def _largest(score: Tensor, tiebreak: Tensor, k: int) -> Tensor:
    """Return a mask of exactly ``k`` largest entries in each row of ``score`` ``(rows, n)``."""
    n = score.shape[1]
    if k <= 0 or k >= n:
        return torch.full_like(score, k > 0, dtype=torch.bool)
    threshold = score.kthvalue(n - k + 1, dim=1, keepdim=True).values
    mask = score > threshold
    tied = score == threshold
    places = k - mask.sum(dim=1)
    if bool((tied.sum(dim=1) == places).all()):
        return mask.logical_or_(tied)
    for row, free in enumerate(places.tolist()):
        candidates = tied[row].nonzero().squeeze(1)
        order = tiebreak[row, candidates].sort(descending=True, stable=True).indices
        mask[row, candidates[order[:free]]] = True
    return mask
