"""Tables and pictures after a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ALREADY_SPARSE = 0.05  # of the constrained weights: models rounded to few bits have some zeros


class Zeros(NamedTuple):
    """Zeros of a model.

    Attributes:
        constrained: Among the constrained weights.
        weights: Constrained weights.
        all: Among all parameters.
        parameters: All of them.
    """

    constrained: int
    weights: int
    all: int
    parameters: int

    @property
    def sparse(self) -> bool:
        """Whether the constrained weights have more zeros than chance and rounding make."""
        return self.constrained > _ALREADY_SPARSE * self.weights

    def shares(self) -> list[str]:
        """Return both shares as the table has them."""
        both = (self.constrained / max(1, self.weights), self.all / max(1, self.parameters))
        return [f"{share:.2%}".replace("%", " %") for share in both]


def perplexity_table(
    *,
    model: str,
    start: tuple[float, Zeros] | None,
    final: tuple[float, Zeros],
    protocol: str,
    distilled: bool = False,
) -> str:
    """Return the closing table of a run: perplexity and zeros before and after.

    Args:
        model: What was trained.
        start: Perplexity and zeros before the first step; None when they were not measured.
        final: Perplexity and zeros after the last step.
        protocol: Text, segments, length and precision of the measurement.
        distilled: Whether the run learnt from the model that it began with.
    """
    name = "start" if start is not None and start[1].sparse else "dense"
    rows = [(name, start), ("final", final)]
    lines = [
        f"{model}: perplexity on {protocol}",
        f"  {'zeros of':10}{'constrained':>14}{'all':>10}{'perplexity':>14}{'weights left':>16}",
    ]
    for row, measured in rows:
        if measured is not None:
            constrained, everything = measured[1].shares()
            left = f"{measured[1].parameters - measured[1].all:,}"
            lines.append(f"  {row:10}{constrained:>14}{everything:>10}{measured[0]:>14.3f}{left:>16}")
    lines.append(f"  ({final[1].weights:,} constrained weights of {final[1].parameters:,} parameters)")
    if start is not None:
        lines.append(f"  {name} → {final[0] / start[0]:.2f}× perplexity")
        if start[1].sparse:
            learnt = ", and distillation learnt from that start" if distilled else ""
            lines.append(f"  (the start was already sparse{learnt})")
    return "\n".join(lines)


def mask_mosaic(masks: Iterable[Tensor], tile: int = 48, columns: int = 7) -> Tensor:
    """Return a picture of where weights are kept: one tile a tensor, brighter where more survive.

    Args:
        masks: One a tensor, True where kept, ``(out, in)``, ``(experts, out, in)`` or kernels ``(out, in, k, k)``;
            looked at one at a time.
        tile: Pixels of a side of a tile.
        columns: Tiles a row; a Llama block has seven matrices.

    Returns:
        Float picture ``(height, width)`` in [0, 1] on the CPU.
    """
    tiles = []
    for mask in masks:
        matrix = mask.flatten(1) if mask.dim() > 3 else mask.flatten(0, -2)
        density = F.adaptive_avg_pool2d(matrix[None].float(), tile)[0]
        tiles.append(F.pad(density / density.max().clamp(min=1e-12), (0, 1, 0, 1), value=1.0).cpu())
    tiles += [torch.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [torch.cat(tiles[start : start + columns], dim=1) for start in range(0, len(tiles), columns)]
    return torch.cat(rows, dim=0)


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first of some names in a line, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
