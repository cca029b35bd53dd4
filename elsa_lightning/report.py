"""The closing table of a run, and pictures of masks and of the share that each tensor keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ALREADY_SPARSE = 0.05  # share of zeros above chance: models rounded to few bits have some zeros


class Zeros(NamedTuple):
    """Counts of zeros in a model.

    Attributes:
        constrained: Zeros among the constrained weights.
        weights: Number of constrained weights.
        all: Zeros among all parameters.
        parameters: Number of all parameters.
    """

    constrained: int
    weights: int
    all: int
    parameters: int

    @property
    def sparse(self) -> bool:
        """Whether the constrained weights have more zeros than chance and rounding explain."""
        return self.constrained > _ALREADY_SPARSE * self.weights

    def shares(self) -> list[str]:
        """Return both shares in the format of the table."""
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
        model: Name of the model.
        start: Perplexity and zeros before the first step; None if not measured.
        final: Perplexity and zeros after the last step.
        protocol: Text, segments, length and precision of the measurement.
        distilled: Whether the run used distillation from its initial model.
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
    """Return a picture of where weights are kept: one tile for each tensor, brighter where more survive.

    Args:
        masks: A mask for each tensor, True where kept, ``(out, in)``, ``(experts, out, in)`` or kernels ``(out, in, k,
            k)``; only one is in memory at a time.
        tile: Side of a tile in pixels.
        columns: Tiles in a row; a Llama block has seven matrices.

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


def shares_map(shares: Mapping[str, float], tile: int = 12) -> Tensor:
    """Return a picture of how much of each tensor is kept: one row for each kind of tensor, one column for each block.

    A tensor's block is the first number in its name, and its kind the rest. The largest share is white, 0 is black;
    where there is no tensor a tile is grey and empty inside.

    Args:
        shares: Shares of entries that are kept, by name.
        tile: Side of a tile in pixels.

    Returns:
        Float picture ``(height, width)`` in [0, 1] on the CPU.
    """
    places = {}
    for name in shares:
        number = re.search(r"(?<![^.])\d+(?![^.])", name)
        kind = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        places[name] = kind, 0 if number is None else int(number.group())
    kinds = {kind: row for row, kind in enumerate(dict.fromkeys(kind for kind, _ in places.values()))}
    blocks = {block: column for column, block in enumerate(sorted({block for _, block in places.values()}))}
    picture = torch.full((len(kinds), len(blocks), tile + 1, tile + 1), 0.5)
    picture[:, :, 1:-2, 1:-2] = 0
    most = max(max(shares.values(), default=0), 1e-12)
    for name, (kind, block) in places.items():
        picture[kinds[kind], blocks[block], :-1, :-1] = shares[name] / most
    return picture.transpose(1, 2).reshape(len(kinds) * (tile + 1), -1)


def shares_line(shares: Mapping[str, float]) -> str | None:
    """Describe how the shares that tensors keep differ, or return None if all are equal to a percent."""
    order = sorted(shares, key=shares.__getitem__)
    if not order or shares[order[0]] >= 0.99 * shares[order[-1]]:
        return None
    least, middle, most = (f"{shares[name]:.3g}" for name in (order[0], order[len(order) // 2], order[-1]))
    return (
        f"tensors keep from {least} ({order[0]}) to {most} ({order[-1]}) of their entries, half of them up to {middle}"
    )


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names in a line, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def finite(value: Any) -> Any:
    """Return the value with None instead of numbers that JSON cannot represent."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
