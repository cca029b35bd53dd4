"""The names of neurons, heads, layers and experts in Hugging Face models, and the numbers of them a config can hold."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from elsa_lightning.adapters import has_adapter
from elsa_lightning.errors import UserError
from elsa_lightning.layout.sharded import clean


@dataclass(frozen=True)
class Family:
    """Names in the models of a family: modules below a block, and fields of the config.

    Attributes:
        blocks: The list of blocks, below the model.
        attention_in: The query, key and value projections.
        attention_out: The output projection of the heads.
        mlp_in: The input projections of the neurons; empty for mixtures of experts.
        mlp_out: The output projection of the neurons.
        experts: The module with the stacks of all experts, ``(experts, out, in)``, or None.
        neurons: The config's field with the number of neurons.
        layers: The config's field with the number of blocks.
        heads: The field with the number of query heads; None if the config has no head_dim, so that fewer heads would
            be wider.
        groups: The field with the number of key-value heads.
        positions: The learnt position embeddings, below the model; a constant before the first block can go there.
        transposed: Whether weights are stored ``(in, out)``.
    """

    blocks: str = "model.layers"
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_out: str = "mlp.down_proj"
    experts: str | None = None
    neurons: str = "intermediate_size"
    layers: str = "num_hidden_layers"
    heads: str | None = "num_attention_heads"
    groups: str = "num_key_value_heads"
    positions: str | None = None
    transposed: bool = False

    @property
    def router(self) -> str:
        """Name of the router, whose weight has a row for each expert."""
        return "mlp.gate"


STACKS = ("gate_up_proj", "down_proj")  # parameters that stack the matrices of all experts
_GATED = Family()
_MIXTURE = Family(mlp_in=(), mlp_out="", experts="mlp.experts")
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _GATED),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MIXTURE),
    "opt": Family(
        blocks="model.decoder.layers", attention_out="self_attn.out_proj", mlp_in=("fc1",), mlp_out="fc2",
        neurons="ffn_dim", heads=None, positions="model.decoder.embed_positions",
    ),
    "gpt2": Family(
        blocks="transformer.h", attention_in=("attn.c_attn",), attention_out="attn.c_proj", mlp_in=("mlp.c_fc",),
        mlp_out="mlp.c_proj", neurons="n_inner", layers="n_layer", heads=None, positions="transformer.wpe",
        transposed=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A model of a known family.

    Attributes:
        family: The family.
        model: The Hugging Face model.
        prefix: Its name in the module in which it was searched for, followed by a dot; empty if it is that module.
    """

    family: Family
    model: nn.Module
    prefix: str

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.model.get_submodule(self.family.blocks))  # type: ignore[arg-type]

    def block(self, index: int) -> str:
        """Return the name of a block, followed by a dot."""
        return f"{self.prefix}{self.family.blocks}.{index}."

    def experts(self, index: int) -> tuple[nn.Module, nn.Module] | None:
        """Return the router and the experts of a block, or None if it has none."""
        block = self.model.get_submodule(f"{self.family.blocks}.{index}")
        inside = dict(block.named_modules())
        found = (inside.get(self.family.router), inside.get(self.family.experts or ""))
        return found if self.family.experts and None not in found else None  # type: ignore[return-value]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Return the number of key-value groups, of query heads in each, and of rows of a head."""
        return head_counts(self.config)


def head_counts(config: Any) -> tuple[int, int, int]:
    """Return a config's number of key-value groups, of query heads in each, and head_dim."""
    heads: int = config.num_attention_heads
    groups: int = getattr(config, "num_key_value_heads", None) or heads
    return groups, heads // groups, getattr(config, "head_dim", None) or config.hidden_size // heads


def find(module: nn.Module) -> Known:
    """Return the Hugging Face model in a module: the outermost that trains, else the outermost.

    Raises:
        UserError: There is no model of a known family, or it has adapters.
    """
    seen = []
    refused: UserError | None = None  # a wrapper may have the config of the model in it
    frozen: Known | None = None  # a teacher beside the model
    for path, inner in module.named_modules():
        config = getattr(inner, "config", None)
        kind = getattr(config, "model_type", None)
        if not isinstance(kind, str):
            continue
        seen.append(f"{type(inner).__name__} of model_type {kind!r}")
        if kind not in FAMILIES:
            continue
        if has_adapter(inner):
            raise UserError("the model has PEFT adapters on it, which keep the shapes as they are: merge them first")
        family, prefix = FAMILIES[kind], clean(f"{path}.") if path else ""
        names = {clean(name) for name, _ in inner.named_parameters()}
        blocks = re.escape(family.blocks)
        parts = (family.attention_out, family.mlp_out or family.experts or "")
        missing = [p for p in parts if not any(re.match(rf"{blocks}\.\d+\.{re.escape(p)}\.", name) for name in names)]
        if missing:
            refused = refused or UserError(
                f"{type(inner).__name__} of model_type {kind!r}: looked for '{family.blocks}.0.{missing[0]}' and found "
                f"names such as {min(names)!r}; what is known is transformers' model for causal language modelling"
            )
            continue
        known = Known(family, inner, prefix)
        if any(p.requires_grad for p in inner.parameters()):
            return known
        frozen = frozen or known
    if frozen is not None:
        return frozen
    if refused is not None:
        raise refused
    raise UserError(
        f"looked for a Hugging Face model whose config.model_type is one of {', '.join(FAMILIES)}, and found "
        f"{', '.join(dict.fromkeys(seen)) or 'no model with a config'}; other models take Unstructured, NM or Block"
    )


def possible_groups(family: Family, config: Any) -> list[int]:
    """Return the numbers of key-value groups that a config of this family can hold, ascending."""
    groups, queries, width = head_counts(config)
    if family.heads is None:
        return [groups]
    found = []
    for count in range(1, groups + 1):
        changed = {family.heads: count * queries, family.groups: count, "head_dim": width}
        try:  # configs validate themselves when made, and when saved
            type(config)(**{**config.to_dict(), **changed})
        except Exception:
            continue
        found.append(count)
    return found


def immovable(config: Any) -> str | None:
    """Return why a block with zero output projections cannot be removed or is not the identity, or None if it can."""
    if getattr(config, "do_layer_norm_before", True) is False:
        return "its blocks end in a norm (do_layer_norm_before false), which changes what passes through"
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "attention is scaled by the number of the block (scale_attn_by_inverse_layer_idx)"
    if getattr(config, "model_type", None) in FAMILIES and FAMILIES[config.model_type].experts:
        return "it is a mixture of experts"
    return None


def with_counts(family: Family, config: Any, counts: Mapping[str, int], kept_layers: list[int]) -> Any:
    """Return a copy of a config with other numbers of units.

    Args:
        family: The model's family.
        config: The model's config.
        counts: Numbers of ``neurons``, ``groups`` and ``experts``; missing ones stay the same.
        kept_layers: Indices of the blocks that stay.
    """
    _, queries, width = head_counts(config)
    new = copy.deepcopy(config)
    if "neurons" in counts:
        setattr(new, family.neurons, counts["neurons"])
    if "groups" in counts and family.heads is not None:
        new.head_dim = width
        setattr(new, family.groups, counts["groups"])
        setattr(new, family.heads, counts["groups"] * queries)
    if "experts" in counts:
        new.num_experts = counts["experts"]
    total = getattr(config, family.layers)
    if len(kept_layers) < total:
        for key, value in config.to_dict().items():
            if re.search(r"layer", key) and isinstance(value, list) and len(value) == total:
                setattr(new, key, [value[index] for index in kept_layers])
        setattr(new, family.layers, len(kept_layers))
    return new
