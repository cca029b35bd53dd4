"""Finds attention heads and neurons that add nothing to a layer's output, by the names of the usual models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SECOND = {  # output projections of neurons or heads, with the projections that compute these, below the same prefix
    "down_proj": ("gate_proj", "up_proj"),
    "fc2": ("fc1",),
    "c_proj": ("c_fc",),
    "w2": ("w1", "w3"),
    "ffn_down": ("ffn_gate", "ffn_up"),
    "wo": ("wi", "wi_0", "wi_1"),
    "dense_4h_to_h": ("dense_h_to_4h",),
    "fc_out": ("fc_in",),
    "output.dense": ("intermediate.dense",),
    "lin2": ("lin1",),
}
_NEURONS = re.compile(rf"(?P<prefix>.*?)\.?(?P<second>{'|'.join(map(re.escape, _SECOND))})\.weight")
_HEADS = re.compile(
    r"(?P<prefix>(.*\.)?[\w]*(attn|attention))\.(o_proj|out_proj|c_proj|wo|out_lin|(output\.)?dense)\.weight"
)
_VALUES = ("v_proj", "self.value", "value", "wv", "v_lin")
_COUNTS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads")


@dataclass(frozen=True)
class Rows:
    """Masks of the rows and columns of a matrix that have non-zeros; for a vector, of its non-zero entries."""

    outputs: Tensor
    inputs: Tensor | None


@dataclass(frozen=True)
class Empty:
    """Heads or neurons of one layer that add nothing to its output.

    Attributes:
        layer: Name of their output projection.
        what: ``heads`` or ``neurons``.
        empty: How many add nothing: their columns in it are 0, or the rows that compute them are, with no bias.
        total: How many there are.
    """

    layer: str
    what: str
    empty: int
    total: int


def empty_units(found: Mapping[str, Rows], config: Mapping[str, Any]) -> Iterator[Empty]:
    """Yield the empty heads and neurons of each layer.

    Args:
        found: Masks of each tensor, by name.
        config: The model's configuration; without it heads are not counted, since no tensor tells their number.
    """
    for name, rows in found.items():
        if rows.inputs is None:
            continue
        if match := _HEADS.fullmatch(name):
            heads = _heads(config)
            if heads and len(rows.inputs) % heads == 0:
                yield _empty_heads(name, match["prefix"], rows.inputs, found, heads)
        elif match := _NEURONS.fullmatch(name):
            yield from _empty_neurons(name, match["prefix"], match["second"], rows.inputs, found)


def _empty_heads(name: str, prefix: str, used: Tensor, found: Mapping[str, Rows], heads: int) -> Empty:
    width = len(used) // heads
    alive = used.view(heads, width).any(dim=1)
    for value in _VALUES:
        made = _made(found, f"{prefix}.{value}")
        if made is not None and len(made) % width == 0 and heads % (len(made) // width) == 0:
            own = made.view(-1, width).any(dim=1)
            alive = alive & own.repeat_interleave(heads // len(own))  # several heads share one value head
    return Empty(name, "heads", int((~alive).sum()), heads)


def _empty_neurons(name: str, prefix: str, second: str, used: Tensor, found: Mapping[str, Rows]) -> Iterator[Empty]:
    start = f"{prefix}." if prefix else ""
    makers = [made for first in _SECOND[second] if (made := _made(found, f"{start}{first}")) is not None]
    if not makers or any(len(made) != len(used) for made in makers):
        return
    alive = torch.stack([used, *makers]).all(dim=0)  # a gate of 0 zeroes a neuron
    yield Empty(name, "neurons", int((~alive).sum()), len(used))


def _made(found: Mapping[str, Rows], layer: str) -> Tensor | None:
    """Return a mask of the outputs of a layer that are not always 0, or None if the layer is not known.

    A bias of another length belongs to a matrix whose outputs are not its rows, so nothing is known of that either.
    """
    weight, bias = found.get(f"{layer}.weight"), found.get(f"{layer}.bias")
    if weight is None or weight.inputs is None:
        return None
    if bias is not None and len(bias.outputs) != len(weight.outputs):
        return None
    return weight.outputs if bias is None else weight.outputs | bias.outputs


def _heads(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, Mapping) else config
    return next((config[key] for key in _COUNTS if isinstance(config.get(key), int)), None)
