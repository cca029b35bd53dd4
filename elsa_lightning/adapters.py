"""PEFT's layers, recognised by what they have: the model without them, and merging that keeps zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from elsa_lightning.errors import UserError
from elsa_lightning.layout.lowbit import pack, unpack
from elsa_lightning.layout.sharded import clean

T = TypeVar("T", bound=Tensor)


def has_adapter(model: nn.Module) -> bool:
    """Say whether PEFT wrapped a model, or put layers into it."""
    return hasattr(model, "peft_config") or any(hasattr(m, "adapter_layer_names") for m in model.modules())


def base_model(model: Any) -> Any:
    """Return the model that PEFT wrapped; its layers may still have adapters in them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_adapters(model: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of a base model by the names they had before adapters were put in, and none of the adapters'.

    Args:
        model: A base model; see :func:`base_model`.
        tensors: Its parameters or its state, by name.
    """
    found = {clean(name): t for name, t in tensors.items()}
    wrapped = {clean(name): module for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")}
    for prefix in sorted(wrapped, key=len, reverse=True):  # the inner ones first
        inside, outside = f"{prefix}.{_wraps(wrapped[prefix])}.", f"{prefix}."
        found = {
            outside + name.removeprefix(inside) if name.startswith(inside) else name: t
            for name, t in found.items()
            if name.startswith(inside) or not name.startswith(outside)
        }
    return found


def _wraps(module: Any) -> str:
    """Return where a layer of PEFT keeps the one it stands for; a trained copy of it comes before the original."""
    if hasattr(module, "base_layer"):
        return "base_layer"
    active = [name for name in getattr(module, "active_adapters", ()) if name in getattr(module, "modules_to_save", ())]
    return f"modules_to_save.{active[0]}" if active else "original_module"


@torch.no_grad()
def merge_and_keep_zeros(model: Any) -> nn.Module:
    """Merge the adapters of a PEFT model into its weights, and zero again what was zero before.

    PEFT's ``merge_and_unload`` adds a dense product to pruned weights, and no zero is left of them. What the adapter
    would change at zeros is lost, so measure the merged model, or train on with the mask fixed.

    Args:
        model: A ``PeftModel`` with active adapters, on a base whose zeros are exact.

    Raises:
        ValueError: It has no adapter that can be merged, or one is merged already and the zeros are gone.
    """
    if not hasattr(model, "merge_and_unload"):
        raise UserError(f"merge_and_keep_zeros takes a PeftModel whose adapter can be merged, got {type(model)}")
    base = base_model(model)
    if merged := [name for name, module in base.named_modules() if getattr(module, "merged", False)]:
        raise UserError(f"the adapter of {merged[0]} is merged already, and filled its zeros: unmerge_adapter() first")
    weights = without_adapters(base, dict(base.named_parameters()))
    masks = {name: pack(p != 0) for name, p in weights.items() if p.dim() > 1 and bool((p == 0).any())}
    whole: nn.Module = model.merge_and_unload()
    for name, p in whole.named_parameters():
        if (mask := masks.get(clean(name))) is not None:
            p.masked_fill_(~unpack(mask, p.shape[-1]), 0)
    return whole
