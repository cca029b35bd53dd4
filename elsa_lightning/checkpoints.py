"""Inspects checkpoints before loading: a distributed one fills only tensors that exist, so these must be created."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from elsa_lightning.errors import UserError
from elsa_lightning.layout.sharded import clean
from elsa_lightning.tensors import MASK

WRITTEN_LAST = "meta.pt"  # the last file that Lightning writes of a distributed checkpoint: all but tensors

Keys = dict[nn.Parameter, set[str]]


def check_whole(path: Path) -> None:
    """Raise ValueError if a distributed checkpoint is incomplete."""
    if path.is_dir() and not (path / WRITTEN_LAST).is_file():
        raise UserError(
            f"{str(path)!r} is no whole checkpoint: the processes that wrote it were ended before it was complete; "
            f"resume from an earlier one"
        )


def check_loadable_by_fsdp1(path: Path) -> None:
    """Raise ValueError if FSDP1 cannot load a checkpoint: it needs state in the parameters' own shapes."""
    check_whole(path)
    if path.is_dir():
        return
    states = torch.load(path, map_location="meta", mmap=True, weights_only=True)["optimizer_states"]
    packed = (s[MASK] for optimizer in states for s in optimizer["state"].values() if MASK in s)
    if any(not mask.is_floating_point() for mask in packed):
        raise UserError(
            f"FSDPStrategy cannot resume {str(path)!r}, which was made on one device, with DDP or with FSDP2; resume "
            f"it with one of these, for a sharded model with lightning.pytorch.strategies.ModelParallelStrategy"
        )


def saved_state_keys(path: Path, model: nn.Module, optimizer: Optimizer, index: int) -> Keys:
    """Return the keys of an optimizer's state in a Lightning checkpoint, by parameter.

    Args:
        path: A file, or the folder of a distributed checkpoint.
        model: The model whose parameters the optimizer trains.
        optimizer: The optimizer.
        index: Its index among the run's optimizers.

    Raises:
        ValueError: The checkpoint is incomplete.
    """
    check_whole(path)
    if path.is_dir():
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        names = FileSystemReader(path).read_metadata().state_dict_metadata
        return _of_flat_names(names, model, f"optimizer_{index}.state.")
    checkpoint = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    states: dict[Any, dict[str, Any]] = checkpoint["optimizer_states"][index]["state"]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    by_name = {clean(name): p for name, p in model.named_parameters()}
    return {trained[k] if isinstance(k, int) else by_name[clean(k)]: set(state) for k, state in states.items()}


def _of_flat_names(names: Iterable[str], model: nn.Module, prefix: str) -> Keys:
    keys: Keys = {}
    by_name = {clean(name): p for name, p in model.named_parameters()}
    for name in map(clean, names):
        parameter, _, key = name.removeprefix(prefix).rpartition(".")
        if name.startswith(prefix) and parameter in by_name:
            keys.setdefault(by_name[parameter], set()).add(key)
    return keys
