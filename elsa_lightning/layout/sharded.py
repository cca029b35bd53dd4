"""Where a process's part of a parameter lies in the whole, however the parameter is sharded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

_SLICE = "_elsa_slice"  # attribute of a parameter that FSDP1 shards
_MIX = (0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32))  # MurmurHash3's finalizer, as int32


@dataclass(frozen=True)
class Part:
    """This process's part of a parameter; the whole of it where nothing is sharded.

    Attributes:
        shape: Of the whole parameter, ``(out, in)`` or ``(experts, out, in)``.
        offsets: Index of the part's first entry in each dimension of the whole.
        counts: Whether this process counts the part: of several that hold the same entries one does.
        order: Place among the parts, which decides between equals.
        sharded: Whether other processes hold other entries.
        start: Index of the first entry in the flattened whole, where the part is a flat slice of it (FSDP1).
    """

    shape: torch.Size
    offsets: tuple[int, ...]
    counts: bool = True
    order: int = 0
    sharded: bool = False
    start: int | None = None

    def noise(self, local: torch.Size, rows: slice, seed: int, device: torch.device) -> Tensor:
        """Return random int32 ``(rows, n)``, which depend on the seed and the place in the whole.

        So a run draws the same numbers on any number of processes, and again when it is resumed.

        Args:
            local: Shape of the part.
            rows: Which of its rows; of a flat slice, which of its entries, then ``(1, n)``.
            seed: Any integer.
            device: Where to.
        """
        if self.start is not None:
            places = torch.arange(rows.start, rows.stop, device=device) + self.start
            return _hashed(places.to(torch.int32)[None], seed)
        columns = torch.arange(local[-1], device=device) + self.offsets[-1]
        row = torch.arange(rows.start, rows.stop, device=device)
        above, stride = torch.zeros_like(row), self.shape[-1]
        for size, whole_size, offset in zip(local[-2::-1], self.shape[-2::-1], self.offsets[-2::-1], strict=True):
            above += (row % size + offset) * stride
            row, stride = row // max(1, size), stride * whole_size
        return _hashed(above.to(torch.int32)[:, None] + columns.to(torch.int32), seed)


def _hashed(bits: Tensor, seed: int) -> Tensor:
    """Mix int32 in place with a seed."""
    bits.bitwise_xor_(_mixed(seed))
    for shift, factor in zip((16, 13), _MIX, strict=True):
        bits ^= (bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        bits *= factor
    bits ^= (bits >> 16).bitwise_and_((1 << 16) - 1)
    return bits


def _mixed(seed: int) -> int:
    """Return a seed's bits spread over an int32."""
    seed = (seed ^ (seed >> 32)) * 0x9E3779B1 & 0xFFFFFFFF
    seed = (seed ^ (seed >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    return (seed ^ (seed >> 13)) - (1 << 31)


def whole(t: Tensor) -> Part:
    """Return the part that is all of a tensor; a number is a vector of one."""
    shape = t.shape or torch.Size((1,))
    return Part(shape, (0,) * len(shape))


def part_of(p: Tensor) -> Part:
    """Return the part that this process holds of a parameter."""
    if isinstance(p, DTensor):
        return _part_of_dtensor(p)
    part: Part | None = getattr(p, _SLICE, None)
    return whole(p) if part is None else part


def parts_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Part]:
    """Return the parts that this process holds of parameters that are counted together.

    Where none is sharded each process counts for itself; else those that all of them hold whole are the first's.
    """
    parts = {p: part_of(p) for p in parameters}
    if not any(part.sharded for part in parts.values()):
        return {p: replace(part, counts=True) for p, part in parts.items()}
    first = dist.get_rank() == 0
    return {
        p: part if part.sharded or isinstance(p, DTensor) else replace(part, counts=first) for p, part in parts.items()
    }


def _part_of_dtensor(p: DTensor) -> Part:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = p.device_mesh, p.placements
    _, offsets = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    order, counts = 0, 0 in mesh.mesh  # on a mesh of some of the processes, the copy with process 0 counts
    for place, size, placement in zip(coordinate, mesh.shape, placements, strict=True):
        if isinstance(placement, Replicate):
            counts = counts and place == 0
        else:
            order = order * size + place
    sharded = any(not isinstance(placement, Replicate) for placement in placements)
    return Part(p.shape, tuple(offsets), bool(counts), order, sharded)


def mark_slices(model: nn.Module) -> None:
    """Tell the parameters that FSDP1 shards which part of them this process holds, for :func:`part_of`.

    FSDP1 keeps each as a flat slice, from any entry of a row to any other, and tells neither shape nor place.
    """
    for unit in _units(model):
        flat = unit._handle.flat_param
        order = dist.get_rank(unit.process_group)
        copies = getattr(unit, "_inter_node_pg", None)  # HYBRID_SHARD
        counts = copies is None or dist.get_rank(copies) == 0
        for p, shape, place in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = place.intra_param_start_idx if place.in_shard else 0
            setattr(p, _SLICE, Part(shape, (), counts, order, True, start))


def settle(model: nn.Module) -> None:
    """Return the parameters to their slices where FSDP1 left them whole after a forward pass, and free the whole."""
    for unit in _units(model):
        if hasattr(unit._handle.flat_param, "_full_param_padded"):  # since the first forward pass
            unit._handle.reshard(free_unsharded_flat_param=True)


def _units(model: nn.Module) -> list[Any]:
    """Return the modules whose parameters FSDP1 shards together."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    units: list[Any] = FullyShardedDataParallel.fsdp_modules(model)
    return [unit for unit in units if unit._handle is not None and unit._handle.uses_sharded_strategy]


def clean(name: str) -> str:
    """Return a parameter's name as it was before FSDP1 or activation checkpointing wrapped its modules."""
    return re.sub(r"_(fsdp_wrapped|checkpoint_wrapped)_module\.", "", name)


def local(t: Tensor) -> Tensor:
    """Return this process's entries, in the same memory."""
    return t.to_local() if isinstance(t, DTensor) else t


@torch.no_grad()
def whole_on_first(t: Tensor) -> Tensor | None:
    """Return a tensor that may be sharded whole on the first process's CPU, and None on the others; all of them ask."""
    if isinstance(t, DTensor):
        t = t.full_tensor()
    elif (part := part_of(t)).start is not None:
        whole = torch.zeros(part.shape, dtype=t.dtype, device=t.device)
        if part.counts:
            whole.view(-1)[part.start : part.start + t.numel()] = t
        dist.reduce(whole, dst=0)
        t = whole
    return t.detach().cpu() if dist.get_rank() == 0 else None


def laid_out_like(p: Tensor, t: Tensor, n: int) -> Tensor:
    """Return local entries as a tensor that is sharded as ``p`` is, so that checkpoints can reshard it.

    Args:
        p: The parameter.
        t: Local entries, ``(..., k)`` with the leading dimensions of the local part of ``p``.
        n: Length of the last dimension of the whole.
    """
    if not isinstance(p, DTensor):
        return t
    shape = torch.Size((*p.shape[:-1], n))
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def check_rows(name: str, p: Tensor, together: int) -> None:
    """Raise ValueError if shards of ``p`` cut rows at other places than multiples of ``together`` entries."""
    if not isinstance(p, DTensor):
        return
    last = p.dim() - 1
    pieces = math.prod(s for s, place in zip(p.device_mesh.shape, p.placements, strict=True) if place.is_shard(last))
    if pieces > 1 and p.shape[last] % (together * pieces):
        raise ValueError(
            f"{name} has rows of {p.shape[last]} entries cut into {pieces} pieces, and {together} entries of a row "
            f"are kept together: shard it by rows, or into pieces whose length is a multiple of {together}"
        )
