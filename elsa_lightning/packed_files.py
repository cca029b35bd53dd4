"""Reads matrices stored in packed forms, some rows at a time: compressed rows, packed integers, GGUF's blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elsa_lightning.errors import UnavailableError, UserError

_COMPRESSED = "cpu_sparse.safetensors"


class Packed(NamedTuple):
    """A matrix that a file stores as several tensors.

    Attributes:
        shape: ``(out, in)``.
        dtype: The dtype that is stored.
        parts: Names of those tensors.
        rows: Returns the rows from one index to another, with zeros where the matrix has zeros.
    """

    shape: tuple[int, int]
    dtype: str
    parts: tuple[str, ...]
    rows: Any


def in_safetensors(file: Path, opened: Any, config: Mapping[str, Any]) -> dict[str, Packed]:
    """Return the matrices of a file that ``elsa export`` wrote as compressed rows, or as ``pack-quantized`` integers.

    Args:
        file: A safetensors file.
        opened: The same file, opened.
        config: The model's configuration, which tells how integers are packed.
    """
    found = {}
    layers = json.loads((opened.metadata() or {}).get("layers", "{}")) if file.name == _COMPRESSED else {}
    for layer, (rows, columns, *_) in layers.items():
        parts = tuple(f"{layer}.{part}" for part in ("crow_indices", "col_indices", "values"))
        slices = [opened.get_slice(part) for part in parts]
        found[f"{layer}.weight"] = Packed((rows, columns), "float32", parts, partial(_compressed, slices, columns))
    names = set(opened.keys())
    for packed in [name for name in names if name.endswith(".weight_packed") and _is_symmetric(config)]:
        weight = packed.removesuffix("_packed")
        if f"{weight}_shape" not in names:
            continue
        rows, columns = (int(n) for n in opened.get_tensor(f"{weight}_shape"))
        words = opened.get_slice(packed).get_shape()[1]
        bits = next((bits for bits in (4, 8) if -(-columns * bits // 32) == words), None)
        if bits is not None:
            parts = tuple(name for part in ("packed", "shape", "scale") if (name := f"{weight}_{part}") in names)
            read = partial(_integers, opened.get_slice(packed), bits, columns)
            found[weight] = Packed((rows, columns), f"int{bits}", parts, read)
    return found


def _is_symmetric(config: Mapping[str, Any]) -> bool:
    """Return whether codes are stored symmetrically, so that the middle code is 0."""
    described = config.get("quantization_config") or {}
    groups = (described.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    return described.get("format") == "pack-quantized" and all(
        w.get("symmetric") is True and w.get("type") == "int" for w in weights
    )


def _compressed(slices: list[Any], columns: int, start: int, stop: int) -> Tensor:
    crow, col, values = slices
    ends = crow[start : stop + 1].long()
    first, last = int(ends[0]), int(ends[-1])
    dense = torch.zeros(stop - start, columns)
    if last > first:
        row = torch.repeat_interleave(torch.arange(stop - start), ends.diff())
        dense[row, col[first:last].long()] = values[first:last]
    return dense


def _integers(packed: Any, bits: int, columns: int, start: int, stop: int) -> Tensor:
    from elsa_lightning.export.quantized import unpack

    return unpack(packed[start:stop], bits, columns).float()


def in_gguf(file: Path) -> Iterator[tuple[str, tuple[int, ...], str, Any]]:
    """Yield name, shape, type and a function that reads rows, for each tensor of a GGUF file, without loading it.

    Raises:
        UserError: The file is not a GGUF file.
        UnavailableError: The package gguf is missing.
    """
    if find_spec("gguf") is None:
        raise UnavailableError(f"{str(file)!r} is read with the package gguf: pip install gguf")
    gguf, quants = import_module("gguf"), import_module("gguf.quants")
    try:
        read = gguf.GGUFReader(str(file))
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{str(file)!r} is no whole GGUF file: {error}") from None

    def rows(t: Any, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(quants.dequantize(t.data[start:stop], t.tensor_type), dtype=np.float32))

    for t in read.tensors:
        yield t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type.name.lower(), partial(rows, t)
