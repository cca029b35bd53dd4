"""Fused Triton kernels for what happens to every weight at every step: one pass, one launch for all tensors of a kind.

Without Triton, without a GPU, or where a layout is not rows below each other, :mod:`elsa_lightning.forms.on_set` and
others do the same by single torch operations, with bit-identical results. Then a step of float8 state takes some forty
launches for each tensor and moves ten times the bytes.

Kernels work on groups of 32 entries of a row, the blocks of float8. They find the tensors in a table of addresses with
one line a tensor.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elsa_lightning.layout.lowbit import BLOCK
from elsa_lightning.layout.sharded import Places, random_bits, sent

try:
    from elsa_lightning.layout import triton_kernels as kernels
except ImportError:  # a build of torch for CPUs comes without Triton
    kernels = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_GROUPS = 64  # groups for which one program works
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # by the dtype in which a split is stored
_NOWHERE = Places(0, 0, 0)


class Line(NamedTuple):
    """One line of the table: rows of weights that lie below each other in memory, with their state.

    Attributes:
        x: The weights ``(rows, n)``.
        packed: Their mask, ``(rows, ⌈n/8⌉)``.
        split: Their split ``(rows, n)``, if it takes the step.
        scale: Exponents of its blocks ``(rows, ⌈n/32⌉)``, if it is float8.
        slow: What a step is divided by before the split takes it, one number.
        places: Where the random numbers begin.
    """

    x: Tensor
    packed: Tensor
    split: Tensor | None = None
    scale: Tensor | None = None
    slow: Tensor | None = None
    places: Places = _NOWHERE


def takes(*tensors: Tensor) -> bool:
    """Return whether the kernels can work on these tensors: contiguous matrices on a GPU that Triton compiles for."""
    return (
        all(t.dim() == 2 and t.stride(-1) == 1 and t.stride(0) == t.shape[1] for t in tensors)
        and all(t.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8) for t in tensors)
        and usable(tensors[0].device)
    )


@cache
def usable(device: torch.device) -> bool:
    """Return whether Triton compiles for a device and gives correct results; this is tried once."""
    if kernels is None or not (device.type == "cuda" or _interpreted()):
        return False
    try:
        x = torch.arange(96.0, device=device).view(2, 48)
        zero_off([Line(x, torch.full((2, 6), 0b1010, dtype=torch.uint8, device=device))])
        wrong = None if int(x.count_nonzero()) == 24 else "a kernel that was tried gave something else"
    except Exception as error:  # it needs a C compiler and headers of Python, among others
        wrong = f"{type(error).__name__}: {error}".splitlines()[0]
    if wrong is not None:
        log.warning(
            "Triton does not work here (%s): steps take many more launches, with the same result. It needs a C "
            "compiler and Python's headers.", wrong,
        )  # fmt: skip
    return wrong is None


def step_off_mask(lines: Sequence[Line]) -> None:
    """Do u ← u + d/ρ and x ← 0 off the masks: x holds the optimizer's step d there, and the split is −u.

    Args:
        lines: Any lines that have a split.
    """
    for alike in _alike(lines):
        split, slow = alike[0].split, alike[0].slow
        assert split is not None and slow is not None
        _launch(kernels.step_off_mask, alike, kind=_KINDS[split.dtype], wide=slow.dtype == torch.float64)


def zero_off(lines: Sequence[Line]) -> None:
    """Zero the weights off the masks, NaN included.

    Args:
        lines: Any lines.
    """
    for alike in _alike(lines):
        _launch(kernels.zero_off, alike)


def add_rounded(now: Tensor, former: Tensor, places: Places) -> None:
    """Write ``former + now``, rounded stochastically to bfloat16, to ``now``.

    Args:
        now: bfloat16 ``(rows, n)``.
        former: Likewise.
        places: Where the random numbers begin.
    """
    groups = now.shape[0] * -(-now.shape[1] // BLOCK)
    with _on(now.device):
        kernels.add_rounded[(-(-groups // _GROUPS),)](
            now, former, random_bits(now.device), *places, *now.shape, aligned=now.shape[1] % BLOCK == 0, groups=_GROUPS
        )


def _alike(lines: Sequence[Line]) -> Iterable[list[Line]]:
    """Group lines that can share a launch: by device, dtype, and dtype of the split."""
    kinds: dict[Any, list[Line]] = {}
    for line in lines:
        kinds.setdefault((line.x.device, line.x.dtype, line.split is not None and line.split.dtype), []).append(line)
    return kinds.values()


def _launch(kernel: Any, lines: Sequence[Line], **options: Any) -> None:
    """Run a kernel on all groups of all lines."""
    table, blocks, aligned = [], 0, True
    for line in lines:
        rows, n = line.x.shape
        others = [0 if t is None else t.data_ptr() for t in (line.split, line.scale, line.slow)]
        addresses = [line.x.data_ptr(), line.packed.data_ptr(), *others]
        aligned = aligned and n % BLOCK == 0 and not any(address % 16 for address in addresses[:3])
        table.append([blocks, rows, n, *addresses, *line.places])
        blocks += -(-rows * -(-n // BLOCK) // _GROUPS)
    if blocks == 0:
        return
    device, dtype = lines[0].x.device, lines[0].x.dtype
    with _on(device):
        kernel[(blocks,)](
            sent(table, device), random_bits(device), len(table), steps=max(1, len(table) - 1).bit_length(),
            dtype=kernels.NAMES[dtype], aligned=aligned, groups=_GROUPS, **options,
        )  # fmt: skip


def _on(device: torch.device) -> Any:
    """Return a context in which kernels are launched on a device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _interpreted() -> bool:
    """Return whether Triton interprets kernels on a CPU, as in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
