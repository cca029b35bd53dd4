"""Counts what an operation moves, launches and waits for: bytes, kernels and looks of the host at the device.

The counts come from the operations that torch dispatches, so they are the same on any machine and need no GPU. Where
there is one way for a CPU and one for a GPU, it is the latter that is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elsa_lightning import ADMM, Unstructured
from elsa_lightning.layout import rows
from elsa_lightning.optim.rounding import Around
from elsa_lightning.schedule import Schedule
from elsa_lightning.sets import threshold

_NOTHING_READ = ("copy_", "fill_", "zero_")  # of what they write
_EMPTY = ("empty", "empty_strided", "empty_like", "new_empty")
# on a GPU these wait until the size or the value of their result is known
_LOOKS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "bincount", "unique", "equal", "is_nonzero")
INTERVAL = 4


@dataclass
class Counts:
    """What was counted.

    Attributes:
        kernels: Operations that touch memory; views do not.
        looks: Times the host waits for the device.
        moved: Bytes that the operations read and write, as if nothing stayed in a cache.
        kept: Of tensors that were there before, bytes that are read or written at least once each: what crosses
            between memory and a cache that holds a piece.
        fresh: Most bytes that one operation makes anew.
        names: How often each operation was called.
    """

    kernels: int = 0
    looks: int = 0
    moved: int = 0
    kept: int = 0
    fresh: int = 0
    names: dict[str, int] = field(default_factory=dict)


class Counting(TorchDispatchMode):
    """Counts while it is on.

    Args:
        counts: Where to; new ones if None.
    """

    def __init__(self, counts: Counts | None = None) -> None:
        super().__init__()
        self.counts = Counts() if counts is None else counts
        self._made: dict[int, Tensor] = {}  # by storage; held, so that no address comes back
        self._seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        looks = name in _LOOKS or (name == "index" and any(_is_mask(t) for t in args[1]))
        if name == "_local_scalar_dense":
            self.counts.looks += 1
            return out
        returned = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        read = list(_tensors(args)) + list(_tensors((kwargs or {}).values()))
        schema = func._schema
        if any(a.alias_info is not None and not a.alias_info.is_write for a in schema.returns):
            return out  # a view
        written = [
            value for a, value in zip(schema.arguments, args, strict=False)
            if a.alias_info is not None and a.alias_info.is_write
        ] + [
            (kwargs or {})[a.name] for a in schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in (kwargs or {})
        ]  # fmt: skip
        written = list(_tensors(written))
        mutated = {id(t) for t in written}
        outs = [t for t in returned if id(t) not in mutated]
        for t in outs:
            if all(t.untyped_storage()._cdata != other.untyped_storage()._cdata for other in read):
                self._made[t.untyped_storage()._cdata] = t
        if name in _EMPTY or name in ("detach", "_unsafe_view", "alias", "lift_fresh"):
            return out
        counts = self.counts
        counts.kernels += 1
        counts.looks += looks
        counts.names[name] = counts.names.get(name, 0) + 1
        overwrites = name in _NOTHING_READ or any(a.is_out for a in schema.arguments)
        for t in read:
            if not (id(t) in mutated and overwrites):
                self._touch(t, "read")
        for t in (*written, *outs):
            self._touch(t, "written")
        counts.fresh = max(counts.fresh, sum(t.numel() * t.element_size() for t in outs))
        return out

    def _touch(self, t: Tensor, how: str) -> None:
        size = _distinct(t) * t.element_size()
        self.counts.moved += size
        storage = t.untyped_storage()._cdata
        key = (storage, t.storage_offset(), size, how)
        large = t.untyped_storage().nbytes() > 4 * rows.PIECE_ON_CPU  # too large for the cache, though made here
        if (large or storage not in self._made) and key not in self._seen:
            self._seen.add(key)
            self.counts.kept += size


def _distinct(t: Tensor) -> int:
    """Return how many entries lie in memory: those along a broadcast dimension are one."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _is_mask(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)


@contextmanager
def counted_by(admm: ADMM, counts: Counts) -> Iterator[None]:
    """Count what ADMM does inside the optimizer's step, rounding included, and not what the optimizer does."""
    hooks: Any = admm._hooks
    before, after = hooks.before, hooks.after
    mode = Counting(counts)

    def counting(call: Any) -> Any:
        def run(*args: Any) -> Any:
            with mode:
                return call(*args)

        return run

    step = Around.step

    @contextmanager
    def rounded(around: Around, p: nn.Parameter, rows: slice) -> Iterator[None]:
        inside = step(around, p, rows)
        with mode:
            inside.__enter__()
        yield
        with mode:
            inside.__exit__(None, None, None)

    hooks.before, hooks.after, Around.step = counting(before), counting(after), rounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        hooks.before, hooks.after, Around.step = before, after, step  # type: ignore[method-assign]


def count(
    form: str, state_dtype: str, *, weights: torch.dtype = torch.float32, shape: tuple[int, int] = (512, 512),
    tensors: int = 1, make: Any = None, early: bool = False,
) -> dict[str, Counts]:  # fmt: skip
    """Return the counts of a step, of one with an update, and of one of the frozen phase.

    Args:
        form: The user's word for it.
        state_dtype: What the split is kept in.
        weights: Their dtype.
        shape: Of each tensor.
        tensors: How many there are.
        make: Makes the optimizer of parameters; None for Adam.
        early: Whether the update is one of the first 150 steps, in which means of F̂ are measured too.
    """
    with as_on_a_gpu():
        return _count(form, state_dtype, weights, shape, tensors, make, early)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Choose operations as for a device that the host has to wait for, wherever the tensors are."""
    hosts = set(rows.HOSTS)
    rows.HOSTS.clear()
    try:
        yield
    finally:
        rows.HOSTS.update(hosts)


def _count(
    form: str, state_dtype: str, weights: torch.dtype, shape: tuple[int, int], tensors: int, make: Any, early: bool
) -> dict[str, Counts]:
    found: dict[str, Counts] = {}
    many = 10**6  # so that stationarity, which is measured ten times a run, is not
    for frozen, wanted in ((0.0, {2 * INTERVAL: "update", 2 * INTERVAL + 1: "step"}), (1 - 1 / many, {4: "frozen"})):
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(weights)) for _ in range(tensors)]
        optimizer = torch.optim.Adam(parameters, lr=1e-3) if make is None else make(parameters)
        named = {str(index): p for index, p in enumerate(parameters)}
        admm = ADMM(
            optimizer, named, Unstructured(0.9), total_steps=many, prox=form,  # type: ignore[arg-type]
            schedule=Schedule(interval=INTERVAL, ramp=0.0, frozen=frozen), state_dtype=state_dtype,  # type: ignore[arg-type]
        )  # fmt: skip
        if not early:
            admm.form.prior = 0.0
        for step in range(1, max(wanted) + 1):
            for p in parameters:
                p.grad = torch.randn(shape, generator=generator).to(weights)
            with counted_by(admm, found.setdefault(wanted[step], Counts())) if step in wanted else nullcontext():
                optimizer.step()
    return found


@contextmanager
def as_sharded() -> Iterator[None]:
    """Find thresholds as over several processes, where no process holds the scores of a whole matrix."""
    held, threshold.HELD = threshold.HELD, 0
    try:
        yield
    finally:
        threshold.HELD = held


def table_row(form: str, state_dtype: str, phase: str, **options: Any) -> dict[str, Any]:
    """Return bytes a weight and operations a piece of one form, state dtype and phase, as a line of a table."""
    large, size = (1024, 1024), (512, 512)  # four pieces, so that nothing of a tensor's size is taken for one; a piece
    assert math.prod(size) == rows.PIECE_ON_CPU
    bytes_ = count(form, state_dtype, shape=large, **options)[phase]
    one, three = (count(form, state_dtype, shape=size, tensors=n, **options)[phase] for n in (1, 3))
    kernels, looks = (three.kernels - one.kernels) // 2, (three.looks - one.looks) // 2
    return {
        "form": form, "state": state_dtype, "phase": phase,
        "bytes": round(bytes_.kept / math.prod(large), 2), "moved": round(bytes_.moved / math.prod(large), 1),
        "kernels_a_piece": kernels, "kernels": one.kernels - kernels,
        "looks_a_piece": looks, "looks": one.looks - looks,
    }  # fmt: skip
