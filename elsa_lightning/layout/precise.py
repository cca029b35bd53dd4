"""Holds what must stay of a model while it is cast or measured: float32 buffers, modes of its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def precise_buffers(model: nn.Module) -> Iterator[None]:
    """Preserve float32 buffers that are not saved, such as frequencies of rotary embeddings, while a model is cast.

    transformers loads weights in 16 bits and computes these buffers anew in float32, whereas
    ``model.to(torch.bfloat16)`` rounds them too, so the model would differ from its saved folder.
    """
    held = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set and buffer.dtype == torch.float32
    ]
    yield
    for module, name, buffer in held:
        now = module._buffers[name]
        if now is not None and now.is_floating_point() and now.dtype.itemsize < buffer.dtype.itemsize:
            module._buffers[name] = buffer.to(now.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of each of its modules afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
