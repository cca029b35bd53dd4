"""The formats of exports: their options, and checks of what each needs before anything is trained or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from elsa_lightning.errors import UserError
from elsa_lightning.export import cpu_sparse
from elsa_lightning.export.blocks import BLOCK
from elsa_lightning.export.gguf import check_convertible, check_gguf
from elsa_lightning.export.project import read_set
from elsa_lightning.export.quantized import BITS, check_groups
from elsa_lightning.export.record import Record
from elsa_lightning.families import find
from elsa_lightning.sets import NM, ByPattern, Constraint, Experts, Quantized, Unstructured
from elsa_lightning.sets.base import parts
from elsa_lightning.sets.structured import is_structured

FORMATS = ("hf", "shrunk", "quantized", "cpu-sparse", "gguf")
_BITS, _GROUP = 4, 128  # of quantized, if neither the user nor the set determines them


@dataclass(frozen=True)
class Options:
    """The options of an export.

    Attributes:
        bits: For ``quantized``: 4 or 8; None takes as many as the grid needs on which the model was trained, else 4.
        group_size: For ``quantized``: columns that share a scale; 0 for one scale a row; None takes the grid's, else
            128.
        break_even: For ``cpu-sparse``: least share of zeros of a layer that is converted.
        gguf_type: For ``gguf``: type of the numbers, one that keeps zeros: ``f32``, ``f16``, ``bf16``, ``q8_0`` or
            ``q4_0``.
        converter: Path of llama.cpp's ``convert_hf_to_gguf.py``; None looks for it among the commands.
    """

    bits: int | None = None
    group_size: int | None = None
    break_even: float = cpu_sparse.BREAK_EVEN
    gguf_type: str = "f16"
    converter: str | None = None

    def on_grid(self, constraint: object) -> Options:
        """Return the options with missing ones filled in from the grid of a set, if it has one."""
        grids = {(each.bits, each.group_size): each for each in parts(constraint) if isinstance(each, Quantized)}
        grid = next(iter(grids.values())) if len(grids) == 1 else None
        bits = self.bits or (_BITS if grid is None else next(b for b in sorted(BITS) if b >= grid.bits))
        size = self.group_size
        if size is None:
            size = _GROUP if grid is None else grid.group_size or 0
        return replace(self, bits=bits, group_size=size)

    def of(self, record: Record) -> Options:
        """Return the options with missing ones filled in from the set under which a model was trained."""
        return self.on_grid(next(iter(sets_of(record)), None))


def sets_of(record: Record) -> list[Constraint]:
    """Return the sets that a record names; a set that cannot be made from its name is left out."""
    found = []
    for settings in record.method:
        try:
            found.append(read_set(str(settings.get("constraint"))))
        except UserError:
            continue
    return found


def has_experts(sets: Iterable[Constraint]) -> bool:
    """Return whether one of some sets, or one that they assign by pattern, removes experts."""
    return any(isinstance(each, Experts) for given in sets for each in parts(given))


def check_format(to: str, options: Options) -> None:
    """Raise UserError if a format is unknown, or its requirements are not installed."""
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}")
    if to == "gguf":
        check_gguf(options.gguf_type, options.converter)


def check_run(
    to: str, options: Options, model: Any, sets: Sequence[Constraint] | None, tokenizer: str | None = None
) -> None:
    """Raise UserError if the model that a run will produce cannot be exported to a format.

    Args:
        to: The format.
        options: Its options.
        model: The model of transformers, before training.
        sets: The sets to which the run constrains its weights; None if not known beforehand.
        tokenizer: Path of the model's tokenizer, if known.
    """
    if to != "shrunk" and has_experts(sets or ()):
        raise UserError(
            f"{to} would have experts that are zero, which this run's routers pass over and plain software chooses: "
            f"take shrunk, and export that folder to {to} afterwards"
        )
    if to == "shrunk":
        find(model)
        if sets is not None and not any(map(is_structured, sets)):
            raise UserError(
                f"shrunk cuts out what is zero as a whole, and no set of this run asks for that "
                f"({', '.join(map(str, sets)) or 'there is none'}): train under Neurons, Heads, Layers or Experts, or "
                f"leave shrunk out"
            )
    elif to == "quantized":
        its = options.on_grid(next(iter(sets or ()), None))
        check_groups(_skeleton(model), int(its.bits or 0), int(its.group_size or 0))
    elif to == "cpu-sparse" and sets:
        shares = [_share(constraint) for constraint in sets]
        known = [share for share in shares if share is not None]
        if len(known) == len(sets) and max(known) < options.break_even:
            raise UserError(
                f"cpu-sparse pays from {options.break_even:.0%} zeros on, and this run leaves {max(known):.0%}: prune "
                f"further, leave cpu-sparse out, or set break_even if you measured another"
            )
    elif to == "gguf":
        if options.gguf_type == "q4_0" and sets is not None and not any(map(_is_on_q4_0, sets)):
            raise UserError(
                f"gguf_type q4_0 packs exactly what lies on a grid of 4 bits in groups of a multiple of {BLOCK}, and "
                f"this run's set has none ({', '.join(map(str, sets)) or 'there is none'}): train under "
                f"Quantized(bits=4, group_size={BLOCK}), or give another type"
            )
        check_convertible(_skeleton(model), tokenizer, check_gguf(options.gguf_type, options.converter))


def _is_on_q4_0(constraint: Constraint) -> bool:
    """Return whether a set may produce weights that Q4_0 holds; sets by pattern are checked only when packing."""
    if isinstance(constraint, Quantized):
        return constraint.bits == 4 and (constraint.group_size or BLOCK) % BLOCK == 0
    return isinstance(constraint, ByPattern)


def _skeleton(model: Any) -> Any:
    """Return a model of the same configuration on the meta device, without wrappers of strategies and adapters."""
    import torch
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            return build(model.config)
    except ValueError as error:  # transformers does not know the configuration
        raise UserError(f"the model cannot be exported, for transformers does not load it by itself: {error}") from None


def _share(constraint: Constraint) -> float | None:
    """Return the share of zeros of the sparsest tensor of a set, or of all tensors if they share one budget.

    None if the set alone does not determine it.
    """
    if isinstance(constraint, Quantized):
        return None if constraint.inside is None else _share(constraint.inside)
    if isinstance(constraint, NM):
        return 1 - constraint.n / constraint.m
    if isinstance(constraint, Unstructured) and constraint.sparsity is not None:
        return constraint.sparsity + constraint.depth
    return None
