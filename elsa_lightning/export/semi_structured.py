"""Converts linear layers with 2:4 zeros to torch's semi-structured tensors, for sparse tensor cores of NVIDIA GPUs."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from elsa_lightning.errors import UnavailableError, UserError
from elsa_lightning.patterns import groups_of
from elsa_lightning.report import some

_DTYPES = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64  # sizes must be multiples of these for both kernels of torch (CUTLASS and cuSPARSELt)
_CAPABILITY = (8, 0)  # Ampere
log = logging.getLogger(__name__)


def why_not_semi_structured(model: nn.Module) -> dict[str, str | None]:
    """Return for each linear layer the reason why 2:4 kernels cannot run it, or None if they can; on any device.

    Args:
        model: Any module; its ``nn.Linear`` layers are examined.
    """
    used = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: _why_not(layer, used[id(layer.weight)] > 1) for name, layer in layers.items()}


def _why_not(layer: nn.Linear, shared: bool) -> str | None:
    weight = layer.weight
    if type(layer) is not nn.Linear:
        return f"is of the class {type(layer).__name__}, whose products may be others than nn.Linear's"
    if shared:
        return "shares its weight with another layer"
    if weight.dtype not in _DTYPES:
        return f"is {str(weight.dtype).removeprefix('torch.')}, and no float16 or bfloat16"
    if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
        return f"is {weight.shape[0]}×{weight.shape[1]}, and no multiple of {_ROWS}×{_COLUMNS}"
    found = groups_of(weight.detach() != 0)["2:4"]
    if found.violating:
        return f"has more than two weights in {found.violating / found.groups:.1%} of its groups of four"
    return None


@torch.no_grad()
def to_semi_structured(model: nn.Module) -> nn.Module:
    """Convert the weights of linear layers with 2:4 zeros to semi-structured tensors, in place. For inference on a GPU.

    A log line tells how many layers were converted, and why others stay dense. The tensors are for this process only:
    save the model before, with :class:`~elsa_lightning.callbacks.SaveHuggingFace` or ``elsa export --to hf``.

    Args:
        model: A model on a CUDA device of compute capability 8.0 or more, float16 or bfloat16.

    Returns:
        The model.

    Raises:
        UserError: The model is on another device, or no layer is 2:4.
    """
    devices = {p.device for p in model.parameters()}
    if torch.version.cuda is None or any(device.type != "cuda" for device in devices):
        where = ", ".join(sorted(map(str, devices)))
        raise UnavailableError(
            f"2:4 kernels are of NVIDIA's GPUs, and the model is on {where}: move it there (model.cuda()), or use "
            f"to_cpu_sparse from 60 % zeros on"
        )
    for device in devices:
        if (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
            raise UnavailableError(
                f"2:4 kernels need a GPU of compute capability 8.0 or more, and {device} has {found[0]}.{found[1]}"
            )
    reasons = why_not_semi_structured(model)
    chosen = [name for name, reason in reasons.items() if reason is None]
    if not chosen:
        first = next((f": {name} {reason}" for name, reason in reasons.items()), "")
        raise UserError(
            f"no linear layer can use 2:4 kernels{first}; train under NM(2, 4), and use float16 or bfloat16"
        )
    for name in chosen:
        layer: Any = model.get_submodule(name)
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.contiguous()), requires_grad=False)
    log.info("%d of %d linear layers use 2:4 kernels", len(chosen), len(reasons))
    for reason in dict.fromkeys(reason for reason in reasons.values() if reason is not None):
        log.info("dense: %s, which %s", some([name for name, why in reasons.items() if why == reason]), reason)
    return model
