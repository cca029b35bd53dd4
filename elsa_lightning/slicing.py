"""``shrink()``: makes a smaller model by removing neurons, heads, layers and experts whose output weights are zero."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from elsa_lightning.adapters import uncompiled
from elsa_lightning.errors import UserError
from elsa_lightning.families import STACKS, Known, find, head_counts, immovable, possible_groups, with_counts
from elsa_lightning.layout.sharded import clean, part_of

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def shrink(model: M, state: Mapping[str, Tensor] | None = None) -> M:
    """Return a smaller model with equal outputs, without the neurons, heads, layers and experts that are zero.

    A neuron or a group of heads is zero if its columns in the output projection are, whatever its other weights; a
    layer if both its output projections are; an expert if its output matrix is. All layers have the same widths in the
    config, so a layer with more zero units than others keeps some of them. Biases that a removed layer still added move
    to the layer before it, or to the position embeddings. Zero experts are those that routers pass over (see
    ``Experts``). The result is a plain Hugging Face model: ``save_pretrained`` and ``from_pretrained`` work without
    this library.

    Args:
        model: A Hugging Face model of a known family; it is not changed.
        state: Its whole state dict, if the model itself is sharded.

    Raises:
        UserError: The model is of no known family, is sharded, or has adapters.
    """
    model = uncompiled(model)
    known = find(model)
    if known.model is not model:
        raise UserError(f"shrink takes the Hugging Face model itself, which is .{known.prefix.rstrip('.')} of this one")
    if state is None:
        if any(part_of(p).sharded for p in model.parameters()):
            raise UserError("the model is sharded: give its whole state, or let SaveHuggingFace shrink it")
        state = model.state_dict()
    tensors = {clean(name): t for name, t in state.items()}
    units = _find_units(known, tensors)
    config = with_counts(known.family, known.config, units.counts(), units.layers)
    plain: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    first = next(t for t in tensors.values() if t.is_floating_point())
    new, report = plain.from_pretrained(
        None, config=config, state_dict=_cut(known, tensors, units), dtype=first.dtype, output_loading_info=True
    )
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise UserError(
            f"the smaller model does not take the weights that were cut for it ({report}): {type(model).__name__} has "
            f"other parameters than its family is known for"
        )
    if (generation := getattr(model, "generation_config", None)) is not None:
        new.generation_config = copy.deepcopy(generation)
    return new.to(first.device).train(model.training)  # type: ignore[no-any-return]


@dataclass
class _Units:
    """The blocks that stay, and the units of each that stay.

    Attributes:
        layers: Indices of the blocks.
        kept: Ascending indices of units, by kind (``neurons``, ``groups``, ``experts``) and block; equally many in each
            block.
    """

    layers: list[int]
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return how many units of each kind stay in a block, for kinds of which some are removed."""
        return {kind: len(next(iter(of.values()))) for kind, of in self.kept.items()}


def _find_units(known: Known, tensors: Mapping[str, Tensor]) -> _Units:
    """Find the blocks and units that are not zero."""
    family, config = known.family, known.config
    groups, *_ = head_counts(config)
    live: dict[str, dict[int, Tensor]] = {"neurons": {}, "groups": {}, "experts": {}}
    for index in range(known.blocks):
        block = f"{family.blocks}.{index}."
        out = _writes(known, tensors[f"{block}{family.attention_out}.weight"])
        live["groups"][index] = out.view(groups, -1).any(dim=1)
        if (experts := tensors.get(f"{block}{family.experts}.{STACKS[1]}")) is not None:
            live["experts"][index] = experts.flatten(1).any(dim=1)
        elif family.mlp_out:
            live["neurons"][index] = _writes(known, tensors[f"{block}{family.mlp_out}.weight"])
    units = _Units(_layers(known, tensors, live))
    possible = possible_groups(family, config)
    for kind, of in live.items():
        of = {index: alive for index, alive in of.items() if index in units.layers}
        if not of:
            continue
        total, count = len(next(iter(of.values()))), max(1, *(int(alive.sum()) for alive in of.values()))
        if kind == "groups":
            count = min(n for n in possible if n >= count)
        elif kind == "experts":
            count = max(count, config.num_experts_per_tok)
            if any(int(alive.sum()) < count for alive in of.values()):
                log.warning("layers have different numbers of experts that are zero, and keep %d each", count)
        if count < total:  # non-zero ones, filled up to the count with zero ones, lower indices first
            units.kept[kind] = {
                index: alive.int().argsort(descending=True, stable=True)[:count].sort().values
                for index, alive in of.items()
            }
    return units


def _writes(known: Known, weight: Tensor) -> Tensor:
    """Return a mask of the inputs of an output projection that have a non-zero weight."""
    return weight.any(dim=1 if known.family.transposed else 0)


def _layers(known: Known, tensors: Mapping[str, Tensor], live: Mapping[str, Mapping[int, Tensor]]) -> list[int]:
    """Return the blocks to keep: those that are not the identity, or whose constant cannot move to an earlier place."""
    everything = list(range(known.blocks))
    if immovable(known.config):
        return everything
    kept: list[int] = []
    for index in everything:
        zero = not any(bool(of[index].any()) for of in live.values() if index in of)
        takes = _taker(known, tensors, kept) is not None or _constant(known, tensors, index) is None
        if not (zero and takes):
            kept.append(index)
    return kept or everything[:1]


def _constant(known: Known, tensors: Mapping[str, Tensor], index: int) -> Tensor | None:
    """Return the constant, float32, that a block with zero matrices adds by its biases, or None for nothing."""
    names = (known.family.attention_out, known.family.mlp_out)
    biases = [tensors.get(f"{known.family.blocks}.{index}.{name}.bias") for name in names]
    found = [bias.float() for bias in biases if bias is not None and bool(bias.any())]
    return torch.stack(found).sum(dim=0) if found else None


def _taker(known: Known, tensors: Mapping[str, Tensor], kept: list[int]) -> str | None:
    """Return the name of the last bias or position embedding before a block that follows these, or None."""
    if not kept:
        return f"{known.family.positions}.weight" if known.family.positions else None
    name = f"{known.family.blocks}.{kept[-1]}.{known.family.mlp_out}.bias"
    return name if name in tensors else None


def _cut(known: Known, tensors: Mapping[str, Tensor], units: _Units) -> dict[str, Tensor]:
    """Return the state dict of the smaller model."""
    start = f"{known.family.blocks}."
    new = {name: t for name, t in tensors.items() if not name.startswith(start)}
    for place, index in enumerate(units.layers):
        block = {name.removeprefix(f"{start}{index}."): t for name, t in tensors.items()
                 if name.startswith(f"{start}{index}.")}  # fmt: skip
        kept = {kind: of[index] for kind, of in units.kept.items() if index in of}
        new |= {f"{start}{place}.{name}": t for name, t in _cut_block(known, block, kept).items()}
    for index in sorted(set(range(known.blocks)) - set(units.layers)):
        before = [i for i in units.layers if i < index]
        constant, taker = _constant(known, tensors, index), _taker(known, tensors, before)
        if constant is not None and taker is not None:
            taker = taker.replace(f"{start}{before[-1]}.", f"{start}{len(before) - 1}.") if before else taker
            new[taker] = (new[taker].float() + constant).to(new[taker].dtype)
    given = {t.data_ptr() for t in tensors.values()}
    copies = {(t.data_ptr(), t.shape): t for t in new.values()}  # tied tensors stay tied
    copies = {key: t.clone() if t.data_ptr() in given else t for key, t in copies.items()}
    return {name: copies[t.data_ptr(), t.shape] for name, t in new.items()}


def _cut_block(known: Known, block: dict[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's tensors with only the units that stay, by names below the block."""
    family, new = known.family, dict(block)
    _, queries, width = head_counts(known.config)

    def take(name: str, units: Tensor, each: int, *, reads: bool) -> None:
        """Keep the units' rows of an input projection (``reads``), or their columns of an output projection."""
        index = (units[:, None] * each + torch.arange(each, device=units.device)).flatten()
        weight, bias = f"{name}.weight", f"{name}.bias"
        new[weight] = block[weight].index_select(int(reads == family.transposed), index)
        if reads and bias in block:
            new[bias] = block[bias][index]

    if (neurons := kept.get("neurons")) is not None:
        for name in family.mlp_in:
            take(name, neurons, 1, reads=True)
        take(family.mlp_out, neurons, 1, reads=False)
    if (groups := kept.get("groups")) is not None and family.heads is not None:
        first, *rest = family.attention_in
        take(first, groups, width * queries, reads=True)
        for name in rest:
            take(name, groups, width, reads=True)
        take(family.attention_out, groups, width * queries, reads=False)
    if (experts := kept.get("experts")) is not None:
        for name in (*(f"{family.experts}.{stack}" for stack in STACKS), f"{family.router}.weight"):
            new[name] = block[name][experts]
    return new
