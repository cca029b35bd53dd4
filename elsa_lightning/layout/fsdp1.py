"""Support of FSDP1 (``FullyShardedDataParallel``): flat slices, and optimizer state in the form that it can save.

FSDP1 keeps each parameter as a flat slice, which begins and ends at any entry and does not tell its shape and place. It
saves an optimizer's state only in the parameter's own shape, in one dtype, and with the same keys for all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from elsa_lightning.errors import UserError
from elsa_lightning.layout.rows import Piece, Rows
from elsa_lightning.layout.sharded import GROUP, SLICE, Part, local, part_of

_NO_MASK = -1.0


# ---------------------------------------------------------------------- slices


def mark_slices(model: nn.Module) -> None:
    """Attach to each parameter the part that this process holds, for :func:`elsa_lightning.layout.sharded.part_of`.

    Under HYBRID_SHARD each replica counts within itself, so all replicas get the same results.

    Raises:
        ValueError: Weights are not contiguous, or the parameters of a layer are only one.
    """
    for unit in _units(model):
        flat = unit._handle.flat_param
        check_separate({"the model": flat} if flat._params is None else {})
        order = dist.get_rank(unit.process_group)
        if not all(flat._contiguities):
            raise UserError(
                "FSDP1 shards weights in the order of their memory, and some are channels_last: call "
                "model.to(memory_format=torch.contiguous_format) before training; inputs can stay channels_last"
            )
        for p, shape, place in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            start = place.intra_param_start_idx if place.in_shard else 0
            setattr(p, SLICE, Part(shape, (), True, order, True, start))
            setattr(p, GROUP, unit.process_group)


def check_separate(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise UserError if a parameter is all of a layer's, as FSDP1 makes them without ``use_orig_params``."""
    for name, p in parameters.items():
        if getattr(p, "_is_flat_param", False):
            raise UserError(
                f"{name} is sharded by FSDP1 with use_orig_params=False, so the weights of a layer cannot be told from "
                f"its bias: wrap it with FullyShardedDataParallel(..., use_orig_params=True)"
            )


def check_marked(name: str, p: nn.Parameter) -> None:
    """Raise UserError if a parameter is a flat slice that :func:`mark_slices` has not seen."""
    check_separate({name: p})
    if getattr(p, "_fsdp_flattened", False) and p.dim() == 1 and not hasattr(p, SLICE):
        raise UserError(
            f"{name} has shape {tuple(p.shape)}: FSDP1 has cut it into flat slices, which do not tell the shape of the "
            f"weight. Call elsa_lightning.layout.fsdp1.mark_slices(model) when the model is wrapped, before select() "
            f"and ADMM"
        )


def settle(model: nn.Module) -> None:
    """Reshard parameters that a forward pass left whole, and free the whole ones."""
    for unit in _units(model):
        if hasattr(unit._handle.flat_param, "_full_param_padded"):  # exists from the first forward pass on
            unit._handle.reshard(free_unsharded_flat_param=True)


def _units(model: nn.Module) -> list[Any]:
    """Return the modules whose parameters are sharded together."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    units: list[Any] = FullyShardedDataParallel.fsdp_modules(model)
    return [unit for unit in units if unit._handle is not None and unit._handle.uses_sharded_strategy]


@torch.no_grad()
def whole_on_first(t: Tensor) -> Tensor | None:
    """Gather a tensor on the first process's CPU and return it, None on the others; all processes must call this."""
    if isinstance(t, DTensor):
        t = t.full_tensor()
    elif (part := part_of(t)).start is not None:
        group = getattr(t, GROUP)
        whole = torch.zeros(part.shape, dtype=t.dtype, device=t.device)
        whole.view(-1)[part.start : part.start + t.numel()] = t
        dist.all_reduce(whole, group=group)
        t = whole
    return t.detach().cpu() if dist.get_rank() == 0 else None


class FlatSlice(Rows):
    """The layout of a flat slice: a piece is some entries, ``(1, n)``; bytes and blocks are those of the whole."""

    @property
    def start(self) -> int:
        """Index of the slice's first entry in the flattened whole."""
        return self.part.start or 0

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    def pieces(self) -> Iterator[Piece]:
        """Yield entries of one matrix within one block of ``limit`` entries of the flattened whole."""
        at, entries, size = 0, self.count, math.prod(self.part.shape[-2:])
        while at < entries:
            place = self.start + at
            stop = min((place // self.limit + 1) * self.limit, (place // size + 1) * size, self.start + entries)
            yield Piece(slice(at, stop - self.start), place // size, 1)
            at = stop - self.start

    def take(self, t: Tensor, rows: slice) -> Tensor:
        """Return a view of entries."""
        return t[None, rows]

    def width(self, rows: slice) -> int:
        """Return the number of entries."""
        return int(rows.stop - rows.start)

    def before(self, rows: slice, each: int) -> int:
        """Return how many entries of the first group lie before these, maybe on another process."""
        return (self.start + int(rows.start)) % each

    def groups(self, t: Tensor, rows: slice, each: int) -> Tensor:
        """Return the numbers of all groups that these entries touch."""
        first = self.start // each
        return t[None, (self.start + rows.start) // each - first : -(-(self.start + rows.stop) // each) - first]

    def room(self, each: int, rows: int = 1) -> tuple[int, ...]:
        """Return the length of a tensor with one number for every group that the slice touches."""
        return (-(-(self.count + self.start % each) // each) if self.count else 0,)

    def index(self, rows: slice, axis: int) -> Tensor:
        """Return the indices of entries along an axis of the whole tensor, ``(1, n)``."""
        place = torch.arange(rows.start, rows.stop, device=self.device)[None] + self.start
        rows_, n = self.part.shape[-2:]
        return (place // n % rows_, place % n, place // (rows_ * n))[axis]


# ---------------------------------------------------------------------- an optimizer's state


class HasDense(Protocol):
    """A parameter whose ADMM state can be read and written with one number an entry."""

    def has(self, key: str) -> bool:
        """Return whether there is state of this name."""

    def dense(self) -> dict[str, Tensor]:
        """Return the existing state, one number an entry."""

    def take_dense(self, dense: dict[str, Tensor]) -> None:
        """Store state from :meth:`dense`."""


class DenseState:
    """Saves and loads an optimizer's state with one number an entry, for every parameter that lies in flat slices.

    Args:
        optimizer: The optimizer.
        tensors: Its constrained tensors.
        ours: Keys of the method's tensors in its state.
        kept: The keys that ``dense`` returns, the mask's first.
    """

    def __init__(
        self, optimizer: Optimizer, tensors: Mapping[nn.Parameter, HasDense], ours: tuple[str, ...],
        kept: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.optimizer, self.tensors, self.ours, self.kept = optimizer, tensors, ours, kept
        self.mask = kept[0]
        self._hook = optimizer.register_state_dict_post_hook(self._saved)

    def remove(self) -> None:
        """Remove the hook, so that the optimizer saves its state unchanged again."""
        self._hook.remove()

    def _saved(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not any(part_of(p).start is not None for group in optimizer.param_groups for p in group["params"]):
            return state_dict
        keys = [key for key in self.kept if any(tensor.has(key) for tensor in self.tensors.values())]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        theirs: dict[str, Any] = next((s for s in state_dict["state"].values() if s.keys() - set(self.ours)), {})
        states = dict(state_dict["state"])
        for index, p in zip(indices, parameters, strict=True):
            if part_of(p).start is None:
                continue
            states.pop(index, None)
            if p.numel() == 0:
                continue
            wide = torch.promote_types(p.dtype, torch.float32)
            state = {key: t for key, t in state_dict["state"].get(index, {}).items() if key not in self.ours}
            if not state and p.requires_grad:  # no gradient so far
                state = {key: _nothing(value, p, wide) for key, value in theirs.items() if key not in self.ours}
            if not state:
                continue
            dense = self.tensors[p].dense() if p in self.tensors else {}
            for key in keys:
                nothing = torch.full_like(p.detach(), _NO_MASK if key == self.mask else 0, dtype=wide)
                state[key] = dense.get(key, nothing)
            states[index] = {key: t.to(wide) if isinstance(t, Tensor) and t.dim() else t for key, t in state.items()}
        return {**state_dict, "state": states}

    def take(self) -> None:
        """Convert loaded dense state to the state of the constrained tensors, in whatever layout they are now."""
        for p in [p for group in self.optimizer.param_groups for p in group["params"]]:
            state = self.optimizer.state.get(p, {})
            if self.mask not in state or not state[self.mask].is_floating_point():
                continue
            dense = {key: local(state.pop(key)) for key in self.kept if key in state}
            if bool((dense[self.mask] < 0).any()):  # not constrained, or no mask yet
                dense = {key: t for key, t in dense.items() if key == self.kept[-1]}
            if p in self.tensors:
                self.tensors[p].take_dense(dense)
            if float(state.get("step", 1)) == 0:  # a placeholder: the parameter had no gradient
                for key in state.keys() - set(self.ours):
                    del state[key]


def _nothing(like: Any, p: Tensor, wide: torch.dtype) -> Any:
    """Return placeholder state of a parameter that was never stepped, in the form that others have."""
    if isinstance(like, Tensor) and like.dim():
        return torch.zeros_like(p, dtype=wide)
    return torch.zeros_like(like) if isinstance(like, Tensor) else 0
