"""Packs matrices on a symmetric grid losslessly as GGUF's blocks of 32 weights: Q4_0 and Q8_0, a float16 scale a block.

llama.cpp's own quantizer chooses its own scales, not those on which a model was trained. So its converter writes the
model in float32, with its names and orders, and matrices on a grid are packed afterwards.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.export.quantized import Grid, find_grid

BLOCK = 32
BITS = {"q4_0": 4, "q8_0": 8}
_FILE_TYPE = {"q4_0": 2, "q8_0": 7}  # general.file_type: the type of most tensors in a file
_WRITTEN = ("general.architecture", "general.file_type")  # fields that are not copied but set


def on_grid(weight: Tensor, bits: int) -> Grid | None:
    """Return codes and float16 scales of a matrix, one scale for 32 columns; None unless they reproduce it exactly.

    Codes are in ±(2^(bits−1) − 1), which both formats have. Trained scales are bfloat16 numbers; float16 holds such a
    number exactly if it is at least 2^-17 and below 65,536.

    Args:
        weight: ``(out, in)``, float32.
        bits: 4 or 8.
    """
    if weight.shape[1] % BLOCK:
        return None
    grid = find_grid(weight, bits, BLOCK, torch.float16, product=torch.float32)
    values = grid.codes.view(*grid.scales.shape, -1).float() * grid.scales.float()[..., None]
    return grid if torch.equal(values.view(weight.shape), weight) else None


def to_blocks(grid: Grid, bits: int) -> np.ndarray[Any, Any]:
    """Return the bytes of a matrix's blocks, uint8 ``(out, bytes)``.

    A Q8_0 block is a scale and 32 int8. A Q4_0 block is a scale and 16 bytes: byte j has the code of column j plus 8 in
    its low half, and that of column j + 16 plus 8 in its high half.
    """
    codes = grid.codes.view(*grid.scales.shape, BLOCK)
    if bits == 4:
        low, high = (codes + 8).view(torch.uint8).chunk(2, dim=-1)
        packed = low | (high << 4)
    else:
        packed = codes.contiguous().view(torch.uint8)
    scales = grid.scales.contiguous().view(torch.uint8).view(*grid.scales.shape, 2)
    return torch.cat([scales, packed], dim=-1).reshape(len(codes), -1).numpy()


def pack_file(source: Path, file: Path, kind: str) -> tuple[int, int]:
    """Rewrite a float32 GGUF file, with matrices on a grid as blocks and other tensors in the smallest exact type.

    Args:
        source: A file that llama.cpp's converter wrote with ``--outtype f32``.
        file: The file to write.
        kind: ``q4_0`` or ``q8_0``.

    Returns:
        How many matrices are blocks, and how many there are. If none is on a grid, nothing is written.
    """
    gguf: Any = import_module("gguf")
    read = gguf.GGUFReader(str(source))
    matrices = {t.name: t for t in read.tensors if len(t.shape) > 1}
    packed: dict[str, np.ndarray[Any, Any]] = {}
    for name, t in matrices.items():
        if (grid := on_grid(_rows(t), BITS[kind])) is not None:
            packed[name] = to_blocks(grid, BITS[kind])
    if not packed:
        return 0, len(matrices)
    types = gguf.GGMLQuantizationType
    plain = {name: _plain(types, _rows(t)) for name, t in matrices.items() if name not in packed}
    kinds = {
        t.name: plain.get(t.name, types[kind.upper()] if t.name in packed else t.tensor_type) for t in read.tensors
    }
    writer = gguf.GGUFWriter(str(file), read.fields["general.architecture"].contents())
    writer.add_file_type(_FILE_TYPE[kind])
    for field in read.fields.values():
        if field.name not in _WRITTEN and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for t in read.tensors:
        block, size = gguf.GGML_QUANT_SIZES[kinds[t.name]]
        count = t.data.size // block * size
        writer.add_tensor_info(t.name, t.data.shape, t.data.dtype, count, raw_dtype=kinds[t.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in read.tensors:
        mine = packed.get(t.name)
        writer.write_tensor_data(_as(types, t.data, kinds[t.name]) if mine is None else mine)
    writer.close()
    return len(packed), len(matrices)


def check_file(source: Path, file: Path) -> None:
    """Raise UserError unless a file has exactly the numbers of another one, as read by the package gguf."""
    gguf, quants = import_module("gguf"), import_module("gguf.quants")
    before, after = (gguf.GGUFReader(str(path)).tensors for path in (source, file))
    for old, new in zip(before, after, strict=True):
        same = old.name == new.name and list(old.shape) == list(new.shape)
        if not same or not np.array_equal(old.data, quants.dequantize(new.data, new.tensor_type)):
            raise UserError(f"{old.name} was packed, and does not come back: nothing is written; give --gguf-type f16")


def _rows(t: Any) -> Tensor:
    """Return a float32 tensor of a file as a matrix, with stacked experts below each other."""
    return torch.from_numpy(np.array(t.data, dtype=np.float32)).reshape(-1, t.data.shape[-1])


def _plain(types: Any, values: Tensor) -> Any:
    """Return the smallest type without scales that holds a tensor exactly."""
    if torch.equal(values.half().float(), values):
        return types.F16
    return types.BF16 if torch.equal(values.bfloat16().float(), values) else types.F32


def _as(types: Any, data: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    if kind not in (types.F16, types.BF16):
        return data
    values = torch.from_numpy(np.array(data))
    return (values.half() if kind == types.F16 else values.bfloat16().view(torch.int16)).numpy()
