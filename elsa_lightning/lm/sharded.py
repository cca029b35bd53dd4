"""Builds a Hugging Face model sharded over processes (FSDP2), so that no device ever holds it whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from elsa_lightning.errors import UserError
from elsa_lightning.layout.sharded import local, part_of


def build_sharded(build: Callable[[], Any], mesh: DeviceMesh, device: torch.device) -> Any:
    """Return the sharded model with uninitialized memory for this process's part of each weight.

    Args:
        build: Returns the model; its weights do not matter.
        mesh: The processes over which it is sharded.
        device: The device of the parts.
    """
    from torch.distributed.fsdp import fully_shard

    with _parameters_on_meta():
        model: Any = build()
    model.tie_weights()
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    model.tie_weights()
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules with parameters on the meta device, but real buffers."""
    from transformers.initialization import no_init_weights

    modules: Any = nn.Module
    register = modules.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    modules.register_parameter = on_meta
    try:
        with no_init_weights():
            yield
    finally:
        modules.register_parameter = register


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's blocks: modules that the model declares unsplittable, else its largest module list."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        stacks: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=None)
        blocks = list(largest.children()) if largest is not None else []
    return blocks


def block_policy(model: nn.Module) -> ModuleWrapPolicy:
    """Return the wrap policy with which FSDP1 shards a decoder by its blocks."""
    return ModuleWrapPolicy({type(block) for block in _blocks(model)})


@torch.no_grad()
def fill(model: nn.Module, path: str, revision: str | None, build: Callable[[], nn.Module]) -> None:
    """Load the weights of a sharded model.

    Each process reads its own rows from safetensors whose names are those of the model's weights; without such files
    the first process builds the whole model in its memory and broadcasts the weights one by one.

    Args:
        model: A model from :func:`build_sharded`.
        path: Folder or hub name; empty to use ``build``.
        revision: Branch, tag or commit on the hub.
        build: Returns the whole model with its weights; called on the first process, for its CPU.
    """
    parameters = dict(model.named_parameters())
    files = _safetensors(path, revision) if path else {}
    if parameters.keys() <= files.keys():
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in files}
        _read({**parameters, **buffers}, str(Path(next(iter(files.values()))).parent))
        return
    whole: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        source = build()
        whole = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, p in parameters.items():
        _take(p, _sent(whole.get(name), p.shape, local(p)))
    for name, buffer in model.named_buffers():
        buffer.copy_(_sent(whole.get(name), buffer.shape, buffer))


def _safetensors(path: str, revision: str | None) -> dict[str, str]:
    """Return the file of each weight by name; empty if the model has no safetensors."""
    from transformers.utils.hub import cached_file

    def find(name: str) -> str | None:
        found: str | None = cached_file(
            path, name, revision=revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return found

    if (index := find("model.safetensors.index.json")) is not None:
        names: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        places = {file: find(file) for file in set(names.values())}
        return {name: place for name, file in names.items() if (place := places[file]) is not None}
    if (single := find("model.safetensors")) is None:
        return {}
    from safetensors import safe_open

    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _read(tensors: dict[str, Tensor], folder: str) -> None:
    """Read this process's part of each weight, and whole buffers, such as the factors with which Gemma 4 scales."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(folder)
    there = reader.read_metadata().state_dict_metadata
    for name, p in tensors.items():
        if (size := getattr(there[name], "size", p.shape)) != p.shape:
            raise UserError(f"{name} has shape {tuple(p.shape)}, and {tuple(size)} in {folder}")
    load({name: p.detach() for name, p in tensors.items()}, storage_reader=reader)


def _place(p: Tensor) -> tuple[slice, ...]:
    """Return the slices of the whole parameter that are this process's part."""
    assert isinstance(p, nn.Parameter)
    offsets = part_of(p).offsets
    return tuple(slice(start, start + size) for start, size in zip(offsets, local(p).shape, strict=True))


def _sent(t: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Broadcast the first process's tensor, and return it on every process."""
    whole = torch.empty(shape, dtype=like.dtype, device=like.device)
    if t is not None:
        whole.copy_(t)
    dist.broadcast(whole, src=0)
    return whole


def _take(p: nn.Parameter, whole: Tensor) -> None:
    local(p).copy_(whole[_place(p)])
