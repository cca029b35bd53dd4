"""Which part of a parameter a process holds, and which processes hold the rest.

Every parameter is described by a :class:`Part`, whether one device holds it, DTensors shard it (FSDP2) or it is a flat
slice (FSDP1, :mod:`elsa_lightning.layout.fsdp1`). :class:`Processes` sums counts over all entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from elsa_lightning.errors import UserError
from elsa_lightning.layout.kernels import is_kernel, matrix_shape

SLICE = "_elsa_slice"  # attribute of a parameter that FSDP1 shards: its Part
GROUP = "_elsa_group"  # attribute with the processes over which FSDP1 shards it
_WITHOUT_FLOAT64 = {"mps"}
_MIX = (0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32))  # MurmurHash3's finalizer, as int32
_TABLE = 1 << 16  # random numbers in each table; a pair, of row and column, makes 2³² for entries
_SPREAD = 0x9E3779B1 - (1 << 32)  # 2³² divided by the golden ratio: high bits of a product depend on all bits


class Places(NamedTuple):
    """Where the random numbers of rows and columns begin in their tables, and the int32 XORed with those of rows."""

    row: int
    column: int
    flips: int


@dataclass(frozen=True)
class Part:
    """This process's part of a parameter; all of it where nothing is sharded.

    Attributes:
        shape: Shape of the whole parameter, ``(out, in)`` or ``(experts, out, in)``; see :meth:`as_matrix`.
        offsets: Index of the part's first entry in each dimension of the whole.
        counts: Whether this process counts the part in sums: of several that hold the same entries only one does.
        order: Index of the part among all parts, which decides ties.
        sharded: Whether other processes hold other entries.
        start: Index of the first entry in the flattened whole, if the part is a flat slice of it (FSDP1).
    """

    shape: torch.Size
    offsets: tuple[int, ...]
    counts: bool = True
    order: int = 0
    sharded: bool = False
    start: int | None = None

    def as_matrix(self, p: Tensor) -> Part:
        """Return the part of a convolution's kernels as part of a matrix, unless shards cut its rows."""
        if not is_kernel(p, self.shape) or _cuts_rows(p):
            return self
        return replace(self, shape=matrix_shape(p, self.shape), offsets=self.offsets and (self.offsets[0], 0))

    def noise(self, local: torch.Size, rows: slice, seed: int, device: torch.device) -> Tensor:
        """Return random int32 ``(rows, n)``, which depend on the seed and the place in the whole.

        So a run draws the same numbers on any number of processes, and again when it is resumed. The numbers are hashes
        of row and column, combined and spread by one product: their high bits are the best.

        Args:
            local: Shape of the part.
            rows: Some of its rows; in a flat slice some of its entries, with a result ``(1, n)``.
            seed: Any integer.
            device: The device of the result.
        """
        n = self.shape[-1]
        if self.start is not None:
            place = torch.arange(rows.start, rows.stop, device=device) + self.start
            by_row, by_column = _hashed(place // n, seed, 0), _hashed(place % n, seed, 1)
            return by_row.bitwise_xor_(by_column).mul_(_SPREAD)[None]
        by_column = _hashed(slice(self.offsets[-1], self.offsets[-1] + local[-1]), seed, 1, device)
        if (first := self._first_row(local)) is not None:
            by_row = _hashed(slice(first + int(rows.start), first + int(rows.stop)), seed, 0, device)
            return (by_row[:, None] ^ by_column).mul_(_SPREAD)
        row = torch.arange(rows.start, rows.stop, device=device)
        above, stride = torch.zeros_like(row), 1
        for size, whole_size, offset in zip(local[-2::-1], self.shape[-2::-1], self.offsets[-2::-1], strict=True):
            above += (row % size + offset) * stride
            row, stride = row // max(1, size), stride * whole_size
        return (_hashed(above, seed, 0)[:, None] ^ by_column).mul_(_SPREAD)

    def _first_row(self, local: torch.Size) -> int | None:
        """Return the index of the part's first row in the whole; None where the part's rows are not consecutive."""
        if local[1:-1] != self.shape[1:-1]:
            return None
        return self.offsets[0] * math.prod(self.shape[1:-1]) if len(local) > 1 else 0

    def places(self, local: torch.Size, rows: slice, seed: int) -> Places | None:
        """Return where :meth:`noise` begins in its tables of random numbers; None where rows are not consecutive.

        Args:
            local: Shape of the part.
            rows: Some of its rows.
            seed: Any integer.
        """
        first = None if self.start is not None else self._first_row(local)
        if first is None:
            return None
        row, column = (first + int(rows.start or 0) + _start(seed, 0), self.offsets[-1] + _start(seed, 1))
        return Places(row % _TABLE, column % _TABLE, _mixed(~seed))

    def noises(self, local: torch.Size, seeds: Sequence[int], device: torch.device) -> Tensor:
        """Return :meth:`noise` of all rows of a matrix for each of some seeds, concatenated along the rows.

        Args:
            local: Shape of the part, a matrix.
            seeds: Any integers.
            device: The device of the result.
        """
        numbers = [(_start(seed, 0), _start(seed, 1), _mixed(~seed)) for seed in seeds]
        by_row, by_column, flips = sent(numbers, device)[..., None].unbind(1)
        row, column = (torch.arange(n, device=device) + at for n, at in zip(local, self.offsets, strict=True))
        tables = random_bits(device)
        above = tables[0][(row + by_row) % _TABLE].bitwise_xor_(flips.int())
        return (above[..., None] ^ tables[1][(column + by_column) % _TABLE][:, None]).mul_(_SPREAD).flatten(0, 1)


def sent(numbers: Any, device: torch.device) -> Tensor:
    """Copy numbers from the host to a device, without waiting for the device."""
    t = torch.tensor(numbers)
    return t if device.type != "cuda" else t.pin_memory().to(device, non_blocking=True)


def _start(seed: int, of: int) -> int:
    """Return the index in a table of random numbers at which a seed begins."""
    return (_mixed(2 * seed + of) & 0x7FFFFFFF) % _TABLE


def _hashed(places: Tensor | slice, seed: int, of: int, device: torch.device | None = None) -> Tensor:
    """Return random int32 for row or column indices, from a table in which the seed chooses the beginning.

    Args:
        places: Indices from 0 on, or a range of them.
        seed: Any integer.
        of: The table: 0 for rows, 1 for columns.
        device: The device of the result, if ``places`` is a range.
    """
    start, flips = _start(seed, of), _mixed(~seed)
    if isinstance(places, slice):
        first, count = (places.start + start) % _TABLE, places.stop - places.start
        table = random_bits(torch.device("cpu") if device is None else device)[of]
        if count <= _TABLE:
            return table[first : first + count] ^ flips if of == 0 else table[first : first + count]
        places = torch.arange(places.start, places.stop, device=device)
    found = random_bits(places.device)[of][(places + start) % _TABLE]
    return found.bitwise_xor_(flips) if of == 0 else found


@cache
def random_bits(device: torch.device) -> Tensor:
    """Return two tables of random int32, the same on any device; each is repeated so that ranges may wrap around.

    They hold hashes of indices, which take a dozen operations: too many for every step.
    """
    bits = torch.arange(2 * _TABLE, device=device).to(torch.int32).bitwise_xor_(0x2545F491)
    for shift, factor in zip((16, 13), _MIX, strict=True):
        bits ^= (bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        bits *= factor
    bits ^= (bits >> 16).bitwise_and_((1 << 16) - 1)
    return bits.view(2, _TABLE).repeat(1, 2)


def _mixed(seed: int) -> int:
    """Return a seed's bits spread over an int32."""
    seed = (seed ^ (seed >> 32)) * 0x9E3779B1 & 0xFFFFFFFF
    seed = (seed ^ (seed >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    return (seed ^ (seed >> 13)) - (1 << 31)


class Processes:
    """The processes among which some parameters are sharded.

    Attributes:
        size: Number of processes; 1 where nothing is sharded.
        root: Global rank of the first of them, which counts entries that all of them hold.

    Args:
        groups: Process groups; summing over each of them in turn sums over all of the processes.
        root: See above.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup] = (), root: int = 0) -> None:
        self.groups, self.root = list(groups), root
        self.size = math.prod(dist.get_world_size(group) for group in self.groups)

    def add(self, t: Tensor) -> Tensor:
        """Sum ``t`` over the processes, in place, and return it; each process contributes what it counts."""
        for group in self.groups:
            dist.all_reduce(t, group=group)
        return t

    def any(self, flags: Collection[bool], device: torch.device) -> list[bool]:
        """Return for each flag whether it is set on any of the processes."""
        if not self.groups:
            return list(flags)
        found = torch.tensor([float(flag) for flag in flags], device=device)
        return [bool(n) for n in self.add(found).tolist()]


def processes_of(parameters: Iterable[nn.Parameter]) -> Processes:
    """Return the processes over which parameters are sharded: those of their meshes, not all of the job.

    Raises:
        ValueError: Parameters are sharded over several meshes, and none contains all others.
    """
    parameters = list(parameters)
    if (group := next((getattr(p, GROUP) for p in parameters if hasattr(p, GROUP)), None)) is not None:
        return Processes([group], dist.get_global_rank(group, 0))
    meshes = {p.device_mesh for p in parameters if isinstance(p, DTensor) and not _replicated(p)}
    if not meshes:
        return Processes()
    largest: DeviceMesh = max(meshes, key=lambda mesh: mesh.size())
    ranks = set(largest.mesh.flatten().tolist())
    for mesh in meshes:
        if not set(mesh.mesh.flatten().tolist()) <= ranks:
            raise UserError(
                f"the parameters of one optimizer are sharded over processes {sorted(ranks)} and over "
                f"{mesh.mesh.flatten().tolist()}, and no mesh contains the other: give each its own optimizer"
            )
    return Processes([largest.get_group(dim) for dim in range(largest.ndim)], int(largest.mesh.flatten()[0]))


def _cuts_rows(kernel: Tensor) -> bool:
    return isinstance(kernel, DTensor) and any(_axis(place) not in (None, 0) for place in kernel.placements)


def _replicated(p: DTensor) -> bool:
    return all(isinstance(placement, Replicate) for placement in p.placements)


def _axis(placement: Placement) -> int | None:
    """Return the dimension along which a placement cuts; a strided one, of FSDP2 beside TP, is no ``Shard``."""
    return getattr(placement, "dim", None)


def _cuts(p: DTensor, axis: int | None = None) -> list[int]:
    """Return the mesh's dimensions that cut ``p``, along an axis or any, from the coarsest cut to the finest.

    A strided placement cuts what those to its right have cut: FSDP2 the pieces that tensor parallelism made.
    """
    cutting = [dim for dim, place in enumerate(p.placements) if (at := _axis(place)) is not None and axis in (None, at)]
    strided = [dim for dim in cutting if isinstance(p.placements[dim], _StridedShard)]
    return [dim for dim in cutting if dim not in strided] + strided[::-1]


def whole(t: Tensor) -> Part:
    """Return the part that is all of a tensor; a scalar counts as a vector of one entry."""
    shape = t.shape or torch.Size((1,))
    return Part(shape, (0,) * len(shape))


def part_of(p: Tensor, root: int = 0) -> Part:
    """Return the part of a parameter that this process holds.

    Args:
        p: The parameter.
        root: The process that counts entries which several processes hold.
    """
    if isinstance(p, DTensor):
        return _part_of_dtensor(p, root)
    part: Part | None = getattr(p, SLICE, None)
    return whole(p) if part is None else part


def parts_of(parameters: Iterable[nn.Parameter], processes: Processes) -> dict[nn.Parameter, Part]:
    """Return this process's parts of parameters that are counted together, as matrices or stacks of them.

    If none is sharded, each process counts for itself; else the first one counts the parameters that all hold whole.
    """
    parts = {p: part_of(p, processes.root).as_matrix(p) for p in parameters}
    if not processes.groups:
        return {p: replace(part, counts=True) for p, part in parts.items()}
    first = dist.get_rank() == processes.root
    return {
        p: part if part.sharded or isinstance(p, DTensor) else replace(part, counts=first) for p, part in parts.items()
    }


def _part_of_dtensor(p: DTensor, root: int) -> Part:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = p.device_mesh, p.placements
    _, offsets = compute_local_shape_and_global_offset(p.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    if _replicated(p):
        return Part(p.shape, tuple(offsets), dist.get_rank() == root)
    order, counts = 0, root in mesh.mesh  # if a mesh has only some processes, the copy that includes root counts
    for dim in _cuts(p):
        order = order * mesh.size(dim) + coordinate[dim]
    for place, placement in zip(coordinate, placements, strict=True):
        counts = counts and (place == 0 or not isinstance(placement, Replicate))
    return Part(p.shape, tuple(offsets), bool(counts), order, True)


_WRAPPED = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # state dicts leave these out
_COMPILED = re.compile(r"\b_orig_mod\.")


def clean(name: str) -> str:
    """Return a parameter's name without the prefixes of FSDP1, activation checkpointing and torch.compile."""
    return _COMPILED.sub("", _WRAPPED.sub("", name))


def match_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename entries of a state dict that differ only in the prefix of torch.compile, because one model was compiled.

    Register it with ``register_load_state_dict_pre_hook``. FSDP1 and activation checkpointing rename by themselves.
    """
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    names = [prefix + _WRAPPED.sub("", name) for name, _ in tensors]
    if not any("_orig_mod." in name for name in (*names, *state_dict)):
        return
    ours = {_COMPILED.sub("", name): name for name in names}
    for key in state_dict.keys() - set(names):
        name = ours.get(_COMPILED.sub("", key))
        if name is not None and name not in state_dict:
            state_dict[name] = state_dict.pop(key)


def local(t: Tensor) -> Tensor:
    """Return a view of this process's entries."""
    return t.to_local() if isinstance(t, DTensor) else t


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for exact sums: float64 where the device has it."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def laid_out_like(p: Tensor, t: Tensor, n: int, rows: int | None = None) -> Tensor:
    """Return local entries as a tensor that is sharded as ``p`` is, so that checkpoints can reshard it.

    Args:
        p: The parameter.
        t: Local entries, ``(..., k)`` with the leading dimensions of the local part of ``p``; for kernels ``(out, k)``.
        n: Length of the last dimension of the whole result.
        rows: Length of the dimension before it; None for that of ``p``.
    """
    if not isinstance(p, DTensor):
        return t
    shape = torch.Size((*p.shape[: t.dim() - 2], p.shape[t.dim() - 2] if rows is None else rows, n))
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(t, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def _falls_between(length: int, sizes: Sequence[int], together: int) -> bool:
    """Return whether cuts of a length, each into so many pieces of those before, keep groups of entries together."""
    lengths = {length}
    for size in (size for size in sizes if size > 1):
        each = {-(-n // size) for n in lengths}  # torch makes pieces as even as this allows
        if any(n % together for n in each):
            return False
        lengths = each | {n % -(-n // size) for n in lengths} - {0}
    return True


def check_grain(name: str, p: Tensor, rows: int, columns: int, stored: int) -> None:
    """Raise ValueError if shards of ``p`` cut blocks of entries that must stay together.

    Args:
        name: Name of the parameter, for the message.
        p: The parameter, ``(..., out, in)``.
        rows: Rows of a block; blocks begin at each multiple.
        columns: Columns of a block, likewise.
        stored: Entries of a row that are stored together.
    """
    if not isinstance(p, DTensor):
        return
    kernel = is_kernel(p, p.shape)
    if kernel and _cuts_rows(p):
        raise UserError(
            f"{name} has a convolution's kernels {tuple(p.shape)} that are sharded along another dimension than their "
            f"first: shard them along dimension 0, as fully_shard does"
        )
    last = [] if kernel else [(p.dim() - 1, columns, stored, "entries of a row")]
    for dim, grain, each, what in (*last, (0 if kernel else p.dim() - 2, rows, 1, "rows")):
        sizes = [p.device_mesh.size(cut) for cut in _cuts(p, dim)]
        pieces, together = math.prod(sizes), math.lcm(grain, each)
        if pieces > 1 and 1 < p.shape[dim] <= grain:
            raise UserError(
                f"{name} has {p.shape[dim]} {what} cut into {pieces} pieces, and the set decides about all of them "
                f"together: shard it along another dimension"
            )
        even = dim != p.dim() - 1 or p.shape[dim] % (together * pieces) == 0
        if pieces > 1 and not (even and _falls_between(p.shape[dim], sizes, together)):
            raise UserError(
                f"{name} has {p.shape[dim]} {what} cut into {pieces} pieces, and {together} {what} are kept together: "
                f"shard it along another dimension, or over a number of processes that makes each piece a multiple of "
                f"{together}"
            )
