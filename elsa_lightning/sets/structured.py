"""Structured sets of Hugging Face models: neurons, heads and layers, whose zeros ``shrink`` cuts out of the model."""

from __future__ import annotations

import copy
import logging
import math
import sys
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import nn

from elsa_lightning.anatomy import shape_of
from elsa_lightning.errors import UserError
from elsa_lightning.families import Known, find, immovable, possible_groups
from elsa_lightning.layout.sharded import clean
from elsa_lightning.sets.base import parts
from elsa_lightning.sets.checks import check_budget, check_fraction, entries_of
from elsa_lightning.sets.tied import Member, Tie, Tied

_HEADER = 110  # bytes that a tensor takes at most, besides its name, in the header of a safetensors file
_WHOLE = sys.maxsize  # Member.entries where a whole tensor belongs to one unit
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Structured(Tied):
    """Units of a Hugging Face model, equally many in every layer, since a config holds one number for all layers.

    The set learns the tensors' names from the model (:meth:`fitted`); a ramp begins with all units. A unit counts as
    zero if its output weights are zero: then it adds nothing, whatever it computes. Its other weights stay free until
    ``shrink`` removes them, so the output weights still get a gradient, by which the unit can return.
    """

    _ties: tuple[Tie, ...] | None = field(default=None, init=False, repr=False, compare=False)

    @abstractmethod
    def of(self, known: Known) -> list[Tie]:
        """Return the ties in a model.

        Raises:
            UserError: The model's config cannot hold so many units.
        """

    def fitted(self, model: nn.Module) -> Self:
        """Return the set with the ties of the model's tensors.

        Raises:
            UserError: The model is of no known family, or its config cannot hold so many units.
        """
        known = find(model)
        names = {known.prefix + clean(name) for name, _ in known.model.named_parameters()}
        ties = self.of(known)
        if missing := [member.name for tie in ties for member in tie.members if member.name not in names]:
            raise UserError(
                f"{self}: looked for {missing[0]!r} and {known.config.model_type!r} here has no such weight"
            )
        return self._with(ties)

    def _with(self, ties: Iterable[Tie]) -> Self:
        new = copy.copy(self)
        object.__setattr__(new, "_ties", tuple(ties))
        return new

    def ties(self, shapes: Mapping[str, torch.Size]) -> list[Tie]:
        """Return the ties of the model that the set was fitted to."""
        if self._ties is None:
            raise UserError(f"{self} must know the model it is for: give {self}.fitted(model)")
        return list(self._ties)

    def covers(self, name: str) -> bool:
        """Return whether a unit has entries in this tensor."""
        return self._ties is None or any(member.name == name for tie in self._ties for member in tie.members)

    def relaxed(self, tightness: float) -> Self:
        """Return the set with a number of units between all and those that survive."""
        if self._ties is None:
            return self
        kept = [tie.units - round((tie.units - tie.kept) * tightness) for tie in self._ties]
        return self._with(tie._replace(kept=count) for tie, count in zip(self._ties, kept, strict=True))


@dataclass(frozen=True)
class Share(Structured):
    """A share of the units of each tie is removed, to the nearest number; at least one survives.

    Args:
        fraction: The share that is removed, 0 ≤ fraction < 1.

    Raises:
        UserError: The fraction is out of range.
    """

    units: ClassVar[str]  # plural name of the units, for messages

    fraction: float

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction, f"the share of {self.units} that is removed,")

    def kept(self, units: int) -> int:
        """Return how many of so many units survive, at least one."""
        return max(1, units - round(self.fraction * units))


def is_structured(constraint: object) -> bool:
    """Return whether a set, or one that it assigns by pattern, has units that ``shrink`` removes."""
    return any(isinstance(each, Structured) for each in parts(constraint))


# ---------------------------------------------------------------------- neurons


@dataclass(frozen=True)
class Neurons(Share):
    """A share of each layer's hidden neurons adds nothing: their columns in the down projection are zero.

    The projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over such z: it keeps the columns with the largest Σ Fᵢ vᵢ², unchanged.
    Ties go to the lower number. The rows of these neurons in the gate and up projections, and their biases, are not
    constrained, and are removed by ``shrink`` with the neurons.

    Args:
        fraction: Share of the neurons that is removed, 0 ≤ fraction < 1, to the nearest number; at least one survives.

    Raises:
        UserError: The fraction is out of range.
    """

    units = "neurons"

    def of(self, known: Known) -> list[Tie]:
        """Return one tie a layer."""
        return _neurons(known, self.kept(_width(known)))


def _width(known: Known) -> int:
    """Return the number of neurons of a layer."""
    family, config = known.family, known.config
    if not family.mlp_in:
        raise UserError(f"{config.model_type!r} has its neurons in experts: Experts(fraction) removes these whole")
    return int(getattr(config, family.neurons) or 4 * config.hidden_size)  # GPT-2's n_inner may be None


def _neurons(known: Known, kept: int) -> list[Tie]:
    family, width = known.family, _width(known)
    names = [f"{known.block(index)}{family.mlp_out}.weight" for index in range(known.blocks)]
    return [Tie(width, kept, (Member(name, 0 if family.transposed else 1),)) for name in names]


# ---------------------------------------------------------------------- heads


@dataclass(frozen=True)
class Heads(Share):
    """A share of each layer's attention heads adds nothing, in whole groups of a key-value head with its query heads.

    The columns of these heads in the output projection are zero. The projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over such
    z: it keeps the groups of columns with the largest Σ Fᵢ vᵢ², unchanged. Ties go to the lower number. The rows of
    these heads in the query, key and value projections, and their biases, are not constrained, and are removed by
    ``shrink`` with the heads.

    Args:
        fraction: Share of the groups that is removed, 0 ≤ fraction < 1, to the nearest number; at least one survives.
            Which fractions are possible depends on the model's config.

    Raises:
        UserError: The fraction is out of range.
    """

    units = "heads"

    def of(self, known: Known) -> list[Tie]:
        """Return one tie a layer."""
        groups, *_ = known.heads
        kept, config = self.kept(groups), known.config
        if known.family.heads is None:
            raise UserError(
                f"heads of {config.model_type!r} cannot be removed: its config has no head_dim, so that fewer heads of "
                f"the same hidden_size would be wider ones; Neurons and Layers are possible"
            )
        if kept not in (possible := possible_groups(known.family, config)):
            fractions = ", ".join(f"{1 - count / groups:.4g}" for count in reversed(possible))
            raise UserError(
                f"{self} leaves {kept} of {groups} groups of heads, which a {type(config).__name__} of hidden_size "
                f"{config.hidden_size} refuses; possible fractions are {fractions}"
            )
        return _heads(known, kept)


def _heads(known: Known, kept: int) -> list[Tie]:
    groups, queries, width = known.heads
    names = [f"{known.block(index)}{known.family.attention_out}.weight" for index in range(known.blocks)]
    return [Tie(groups, kept, (Member(name, 1, width * queries),)) for name in names]


# ---------------------------------------------------------------------- both, to a budget


@dataclass(frozen=True)
class Width(Structured):
    """Neurons and heads of each layer are removed, in similar shares, so that the model has so many parameters.

    Heads come in groups, so their share is the possible one closest to that of the neurons, which make up the
    difference; if the config cannot hold fewer heads, only neurons are removed. The projection is that of
    :class:`Neurons` and :class:`Heads`.

    Args:
        keep: Largest number of parameters of the smaller model, embeddings included, such as 1.5e6.
        keep_bytes: Largest size of its safetensors file in bytes, instead of ``keep``, in the dtype in which the model
            is trained: saved in fewer bits it is smaller.

    Raises:
        UserError: None or both of the two are given, or the number is not positive.
    """

    keep: float | None = None
    keep_bytes: float | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.keep_bytes is None):
            raise UserError(
                f"give keep (parameters of the smaller model, such as 1.5e6) or keep_bytes (bytes of its file), one of "
                f"the two; got keep={self.keep}, keep_bytes={self.keep_bytes}"
            )
        check_budget("parameters", keep=self.keep, keep_bytes=self.keep_bytes)

    def of(self, known: Known) -> list[Tie]:
        """Return two ties a layer."""
        family, width, (groups, *_) = known.family, _width(known), known.heads
        found = {known.prefix + clean(name): p for name, p in known.model.named_parameters()}
        sizes = {name: shape_of(p).numel() for name, p in found.items()}
        each = {name: p.element_size() for name, p in found.items()}
        header = sum(len(name) + _HEADER for name in found)
        in_file = None if self.keep_bytes is None else self.keep_bytes - header
        keep = entries_of(self.keep, in_file, sizes, each)
        a_neuron = _size_of_all(known, sizes, family.mlp_in, family.mlp_out) // width
        a_group = _size_of_all(known, sizes, family.attention_in, family.attention_out) // groups
        total = sum(sizes.values())
        fixed = total - a_neuron * width - a_group * groups
        possible = possible_groups(family, known.config)
        choices = [(math.floor((keep - fixed - a_group * count) / a_neuron), count) for count in possible]
        fitting = [(neurons, count) for neurons, count in choices if neurons >= 1]
        least = fixed + a_neuron + a_group * possible[0]
        if not fitting or keep > total:
            said, low, high = f"keep={self.keep or 0:g} parameters", least, total
            if self.keep_bytes is not None:
                whole = sum(size * each[name] for name, size in sizes.items())
                low, high = (header + math.ceil(whole * count / total) for count in (least, total))
                said = f"keep_bytes={self.keep_bytes:g} bytes"
            raise UserError(f"{said} of a model of {high:,}: give from {low:,} to {high:,}")

        def order(choice: tuple[int, int]) -> tuple[bool, float, int]:
            """Prefer choices that use the whole budget, then those with similar shares of neurons and heads."""
            whole = choice[0] <= width
            return not whole, whole * abs(choice[0] / width - choice[1] / groups), -choice[1]

        neurons, kept = min(fitting, key=order)
        neurons = min(neurons, width)
        log.info("%s: %d of %d neurons and %d of %d groups of heads", self, neurons, width, kept, groups)
        heads = _heads(known, kept) if family.heads else []
        return _neurons(known, neurons) + heads


def _size_of_all(known: Known, sizes: Mapping[str, int], reads: Iterable[str], writes: str) -> int:
    """Return how many parameters the units of all blocks have, without the biases of their output projection."""
    blocks = [known.block(index) for index in range(known.blocks)]
    names = [f"{name}.{kind}" for name in reads for kind in ("weight", "bias")]
    return sum(sizes.get(block + name, 0) for block in blocks for name in (*names, f"{writes}.weight"))


# ---------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layers(Share):
    """A share of the layers adds nothing: the output projections of attention and MLP are zero.

    The projection is argmin_z Σᵢ Fᵢ (zᵢ − vᵢ)² over such z: it keeps the layers with the largest Σ Fᵢ vᵢ² over both,
    unchanged. Ties go to the lower number. All other weights of these layers are not constrained, and are removed by
    ``shrink`` with the layers.

    Args:
        fraction: Share of the layers that is removed, 0 ≤ fraction < 1, to the nearest number; at least one survives.

    Raises:
        UserError: The fraction is out of range.
    """

    units = "layers"

    def of(self, known: Known) -> list[Tie]:
        """Return one tie."""
        family, kind, blocks = known.family, known.config.model_type, known.blocks
        if reason := immovable(known.config):
            raise UserError(f"layers of this {kind!r} cannot be removed: {reason}")
        if bias := constant_without_place(known):
            raise UserError(
                f"layers of this {kind!r} cannot be removed: without its matrices a layer still adds {bias}, and "
                f"nothing before it can take that constant"
            )
        names = (family.attention_out, family.mlp_out)
        members = (Member(f"{known.block(i)}{name}.weight", 0, _WHOLE, i) for i in range(blocks) for name in names)
        return [Tie(blocks, self.kept(blocks), tuple(members))]


def constant_without_place(known: Known) -> str | None:
    """Return the name of a bias that a removed block would still have to add and no other place can take, or None."""
    family = known.family
    names = {known.prefix + clean(name) for name, _ in known.model.named_parameters()}
    biases = {name: f"{known.block(0)}{name}.bias" in names for name in (family.attention_out, family.mlp_out)}
    found = [f"{known.block(0)}{name}.bias" for name, there in biases.items() if there]
    return found[0] if found and not (biases[family.mlp_out] and family.positions) else None
