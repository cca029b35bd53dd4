"""The Triton kernels of :mod:`elsa_lightning.layout.fused`, on arrays ``(groups, 32)``: groups, and entries of each.

Their results equal those of :mod:`elsa_lightning.layout.lowbit` to the bit, so divisions round to nearest, and float8
is computed with integers; not every GPU has instructions for float8 anyway.
"""

import torch
import triton
import triton.language as tl

NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _place(table, count, steps: tl.constexpr, groups: tl.constexpr):
    """Return the line of the table on which this program works, and its groups, ``(groups, 1)``."""
    program = tl.program_id(0).to(tl.int64)
    low, high = tl.full((), 0, tl.int64), count.to(tl.int64) - 1
    for _ in tl.static_range(steps):  # the last line whose first program is not beyond this one
        middle = (low + high + 1) // 2
        reached = tl.load(table + middle * 11) <= program
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    line = table + low * 11
    group = (program - tl.load(line)) * groups + tl.arange(0, groups)
    return line, group[:, None]


@triton.jit
def _entries(rows, n, group, aligned: tl.constexpr):
    """Return the groups' entries: row, column, offset in memory, whether they exist, and offset of their mask byte."""
    lane = tl.arange(0, 32)[None, :]
    if aligned:  # rows are whole groups, so groups are contiguous
        each = n // 32
        row, column = group // each, (group % each) * 32 + lane
        return row, column, group * 32 + lane, (group < rows * each) & (lane >= 0), group * 4 + lane // 8
    each = (n + 31) // 32
    row, column = group // each, (group % each) * 32 + lane
    there = (row < rows) & (column < n)
    return row, column, row * n + column, there, row * ((n + 7) // 8) + column // 8


@triton.jit
def _pointer(cell, dtype: tl.constexpr, aligned: tl.constexpr):
    """Return the address in a cell of the table as a pointer."""
    pointer = tl.load(cell).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def _kept(line, at_bits, column, there):
    """Return which entries the mask keeps."""
    byte = tl.load(_pointer(line + 4, tl.uint8, False) + at_bits, mask=there, other=0)
    return ((byte.to(tl.int32) >> (column % 8).to(tl.int32)) & 1) == 1


@triton.jit
def _noise(bits, row, column, row_start, column_start, flips):
    """Return the random int32 of :meth:`elsa_lightning.layout.sharded.Part.noise`."""
    by_row = tl.load(bits + ((row + row_start) & 0xFFFF)) ^ flips.to(tl.int32)
    by_column = tl.load(bits + 131072 + ((column + column_start) & 0xFFFF))
    return (by_row ^ by_column) * -1640531535


@triton.jit
def _to_bfloat16(values, noise):
    """Return values rounded stochastically, as :func:`elsa_lightning.layout.lowbit.round_to_bfloat16` does."""
    bits = ((noise & 0xFFFF) + values.to(tl.int32, bitcast=True)) & -65536
    rounded = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return rounded.to(tl.bfloat16)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _from_float8(byte):
    """Return the values of bytes of float8_e4m3fn, since not every GPU has instructions for it."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    value = tl.where((byte & 127) == 127, float("nan"), value)
    return tl.where(byte >= 128, -value, value)


@triton.jit
def _to_float8(values, noise, there):
    """Return bytes of float8_e4m3fn and the exponent of each group, as ``_round_to_float8`` of ``lowbit`` does."""
    largest = tl.max(tl.where(there, tl.abs(values), 0.0), axis=1, keep_dims=True)
    part = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32)).to(tl.int32, bitcast=True)
    exponent = tl.where(part == 0, 0, tl.maximum((part >> 23) - 126, -126))
    exponent = tl.where((part >> 23) == 255, 0, exponent)
    fits = _power_of_two(exponent) * 224.0 >= largest
    exponent = tl.maximum(exponent - fits.to(tl.int32), -126)
    scaled = values * _power_of_two(-exponent)
    near = (((noise & 1048575) + scaled.to(tl.int32, bitcast=True)) & -1048576).to(tl.float32, bitcast=True)
    dithered = near + ((noise >> 19) | 1).to(tl.float32) * 2.384185791015625e-07
    bits, size = dithered.to(tl.int32, bitcast=True), tl.abs(near)
    small = (tl.abs(dithered) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0x7FFFFF  # to nearest, ties to even
    code = tl.where(size < 0.015625, small, (size.to(tl.int32, bitcast=True) >> 20) - 960)
    code = tl.where(near == near, tl.minimum(code, 127), 127)
    return ((bits >> 24) & 128) | code, exponent


@triton.jit(do_not_specialize=["count"])
def step_off_mask(
    table, bits, count, steps: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr, groups: tl.constexpr,
    kind: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Do u ← u + d/ρ and x ← 0 off the masks."""
    line, group = _place(table, count, steps, groups)
    row, column, at, there, at_bits = _entries(tl.load(line + 1), tl.load(line + 2), group, aligned)
    x = _pointer(line + 3, dtype, aligned) + at
    kept = _kept(line, at_bits, column, there)
    value = tl.load(x, mask=there, other=0.0)  # loading and storing whole vectors is faster than single entries
    tl.store(x, tl.where(kept, value, tl.zeros(value.shape, dtype)), mask=there)
    d = tl.where(kept, 0.0, value.to(tl.float32))
    slow = tl.load(_pointer(line + 7, tl.float64 if wide else tl.float32, False)).to(tl.float32)
    taken = tl.div_rn(d, tl.zeros(d.shape, tl.float32) + slow)
    if kind == 0:
        split = _pointer(line + 5, tl.float32, aligned) + at
        tl.store(split, tl.load(split, mask=there, other=0.0) - taken, mask=there)
    else:
        noise = _noise(bits, row, column, tl.load(line + 8), tl.load(line + 9), tl.load(line + 10))
        if kind == 1:
            split = _pointer(line + 5, tl.bfloat16, aligned) + at
            value = tl.load(split, mask=there, other=0.0).to(tl.float32) - taken
            tl.store(split, _to_bfloat16(value, noise), mask=there)
        else:
            split = _pointer(line + 5, tl.uint8, aligned) + at
            scale = _pointer(line + 6, tl.int8, False) + group
            present = group < tl.load(line + 1) * ((tl.load(line + 2) + 31) // 32)
            exponent = tl.load(scale, mask=present, other=0).to(tl.int32)
            stored = tl.load(split, mask=there, other=0).to(tl.int32)
            value = _from_float8(stored) * _power_of_two(exponent) - taken
            code, exponent = _to_float8(value, noise, there)
            tl.store(split, code.to(tl.uint8), mask=there)
            tl.store(scale, exponent.to(tl.int8), mask=present)


@triton.jit(do_not_specialize=["count"])
def zero_off(table, bits, count, steps: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr, groups: tl.constexpr):
    """Zero the weights off the masks."""
    line, group = _place(table, count, steps, groups)
    _, column, at, there, at_bits = _entries(tl.load(line + 1), tl.load(line + 2), group, aligned)
    x, kept = _pointer(line + 3, dtype, aligned) + at, _kept(line, at_bits, column, there)
    tl.store(x, tl.zeros(at.shape, dtype), mask=there & ~kept)


@triton.jit(do_not_specialize=["row_start", "column_start", "flips"])
def add_rounded(
    now, former, bits, row_start, column_start, flips, rows, n, aligned: tl.constexpr, groups: tl.constexpr
):  # fmt: skip
    """Write ``former + now``, rounded stochastically, to ``now``."""
    group = (tl.program_id(0).to(tl.int64) * groups + tl.arange(0, groups))[:, None]
    row, column, at, there, _ = _entries(rows, n, group, aligned)
    value = tl.load(former + at, mask=there, other=0.0).to(tl.float32)
    value += tl.load(now + at, mask=there, other=0.0).to(tl.float32)
    rounded = _to_bfloat16(value, _noise(bits, row, column, row_start, column_start, flips))
    tl.store(now + at, rounded, mask=there)
