"""Tables after a run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def perplexity_table(*, model: str, dense: float | None, final: float, sparsity: float, protocol: str) -> str:
    """Return the closing table of a run: perplexity before and after.

    Args:
        model: What was trained.
        dense: Perplexity before the first step; None when it was not measured.
        final: Perplexity after the last step.
        sparsity: Zeros over elements of the linear layers' weights, after the last step.
        protocol: Text, segments, length and precision of the measurement.
    """
    rows = [("dense", "0.00 %", dense)] if dense is not None else []
    rows.append(("final", f"{sparsity:.2%}".replace("%", " %"), final))
    lines = [f"{model}: perplexity on {protocol}", f"  {'':10}{'sparsity':>10}{'perplexity':>14}"]
    lines += [f"  {name:10}{zeros:>10}{value:>14.3f}" for name, zeros, value in rows if value is not None]
    lines.append("  (zeros of the weights of all linear layers but the head)")
    if dense is not None:
        lines.append(f"  dense → {final / dense:.2f}× perplexity")
    return "\n".join(lines)


def mask_mosaic(masks: Iterable[Tensor], tile: int = 48, columns: int = 7) -> Tensor:
    """Return a picture of where weights are kept: one tile a tensor, brighter where more survive.

    Args:
        masks: One a tensor, True where kept, ``(out, in)`` or ``(experts, out, in)``; looked at one at a time.
        tile: Pixels of a side of a tile.
        columns: Tiles a row; a Llama block has seven matrices.

    Returns:
        Float picture ``(height, width)`` in [0, 1] on the CPU.
    """
    tiles = []
    for mask in masks:
        density = F.adaptive_avg_pool2d(mask.flatten(0, -2)[None].float(), tile)[0]
        tiles.append(F.pad(density / density.max().clamp(min=1e-12), (0, 1, 0, 1), value=1.0).cpu())
    tiles += [torch.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [torch.cat(tiles[start : start + columns], dim=1) for start in range(0, len(tiles), columns)]
    return torch.cat(rows, dim=0)
