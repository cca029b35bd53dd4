"""PEFT adapters, recognised by attributes without importing peft: base models, names, and merging that keeps zeros."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from elsa_lightning.errors import UserError
from elsa_lightning.layout.lowbit import pack, unpack
from elsa_lightning.layout.sharded import clean

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Tensor)


def has_adapter(model: nn.Module) -> bool:
    """Return whether PEFT wrapped a model, or put adapter layers into it."""
    return hasattr(model, "peft_config") or any(hasattr(m, "adapter_layer_names") for m in model.modules())


def base_model(model: Any) -> Any:
    """Return the model that PEFT wrapped; its layers may still have adapters in them."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def uncompiled(model: Any) -> Any:
    """Return the model that ``torch.compile`` wrapped."""
    return getattr(model, "_orig_mod", model)


def without_adapters(model: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of a base model by their names without adapters, and leave out those of the adapters.

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
    """Return the attribute in which a PEFT layer keeps the layer it wraps; a trained copy has precedence."""
    if hasattr(module, "base_layer"):
        return "base_layer"
    active = [name for name in getattr(module, "active_adapters", ()) if name in getattr(module, "modules_to_save", ())]
    return f"modules_to_save.{active[0]}" if active else "original_module"


@torch.no_grad()
def merge_and_keep_zeros(model: Any, loss: Callable[[nn.Module], float] | None = None) -> nn.Module:
    """Merge the adapters of a PEFT model into its weights, and restore the zeros of the weights.

    PEFT's ``merge_and_unload`` adds a dense product to pruned weights, so no zeros are left. Here the adapter's changes
    at zeros are discarded; a log line tells how large they were. If that costs too much, train on with
    :class:`~elsa_lightning.KeepMask`.

    Args:
        model: A ``PeftModel`` with active adapters, on a base whose zeros are exact.
        loss: Measures a model, such as its mean loss over held-out batches in ``eval()`` mode; called before and after,
            and both results are logged.

    Raises:
        ValueError: The model has no adapter that can be merged, or one is merged already and the zeros are gone.
    """
    if not hasattr(model, "merge_and_unload"):
        raise UserError(f"merge_and_keep_zeros takes a PeftModel whose adapter can be merged, got {type(model)}")
    base = base_model(model)
    if merged := [name for name, module in base.named_modules() if getattr(module, "merged", False)]:
        raise UserError(f"the adapter of {merged[0]} is merged already, and filled its zeros: unmerge_adapter() first")
    before = None if loss is None else float(loss(model))
    weights = without_adapters(base, dict(base.named_parameters()))
    sparse = {name: p for name, p in weights.items() if p.dim() > 1 and bool((p == 0).any())}
    kept = {name: (pack(p != 0), p[p != 0]) for name, p in sparse.items()}
    whole: nn.Module = model.merge_and_unload()
    lost = added = 0.0
    for name, p in whole.named_parameters():
        if (former := kept.pop(clean(name), None)) is None:
            continue
        mask = unpack(former[0], p.shape[-1])
        at_zeros = float(p.masked_fill(mask, 0).float().square().sum())
        lost += at_zeros
        added += at_zeros + float((p[mask].float() - former[1].float()).square().sum())
        p.masked_fill_(~mask, 0)
    if kept:
        raise UserError(f"merging renamed {', '.join(kept)}, whose zeros are filled now")
    line = f"Merged under the mask: {lost / added if added else 0:.1%} of what the adapter adds (squared) was at zeros"
    if loss is not None and before is not None:
        after = float(loss(whole))
        line += f"; loss {before:.4f} with the adapter, {after:.4f} merged ({after - before:+.4f})"
    log.warning("%s.", line)
    return whole
