"""Storage formats of the ADMM state: float32, bfloat16 or block-scaled float8, and one bit a weight for the mask.

Rounding to fewer bits is stochastic: up or down with the probabilities that make the mean exact. The dual grows
by steps far below half a unit of its last place: rounding to nearest would lose each of them, and the dual would
stand still, while with stochastic rounding its mean moves as the exact dual does.

Bits and blocks run along rows, so that the stored form of a row depends on that row alone and is sharded with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from elsa_lightning.errors import UserError
from elsa_lightning.layout.rows import on_host

StateDtype = Literal["float32", "bfloat16", "float8_e4m3fn"]

BLOCK = 32  # entries that share a power-of-two scale, as in the OCP microscaling formats
_LARGEST = 448.0  # largest value of float8_e4m3fn
_SPACING = 2.0**-9  # distance of its subnormals
_DROPPED = 20  # bits of float32's 23-bit mantissa that float8 drops
_GATHER = 0x0102040810204080  # multiplied by eight bytes of 0 or 1, the highest byte of the product has them as bits
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_state_dtype(name: str) -> StateDtype:
    """Return ``name``; raise ValueError if the state cannot be stored in that dtype."""
    if name not in get_args(StateDtype):
        raise UserError(f"state_dtype must be one of {get_args(StateDtype)}, got {name!r}")
    return cast(StateDtype, name)


def pack(mask: Tensor) -> Tensor:
    """Return a bool mask ``(..., n)`` as bytes ``(..., ⌈n/8⌉)``, the first entry of each row in the lowest bit."""
    eight = _split(mask, 8).contiguous().view(torch.int64).squeeze(-1)  # a byte each, 0 or 1
    return ((eight * _GATHER) >> 56).to(torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """Return the bool mask ``(..., n)`` that :func:`pack` packed."""
    if not on_host(packed):  # a table is slow on a GPU
        bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)).bitwise_and_(1)
        return bits.view(torch.bool).flatten(-2)[..., :n]
    eight = _table(packed.device, torch.bool).index_select(0, packed.flatten().int())
    return eight.view(torch.bool).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :n]


def unpack_wide(packed: Tensor, n: int, dtype: torch.dtype, kept: bool) -> Tensor:
    """Return integers ``(..., n)`` of a dtype's width, with all bits set where a packed mask equals ``kept``.

    Their bitwise and with the bits of a tensor zeroes it elsewhere, in one pass.
    """
    bits = _table(packed.device, _INTEGERS[dtype.itemsize], kept).index_select(0, packed.flatten().int())
    return bits.view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :n]


def ones(packed: Tensor, n: int) -> Tensor:
    """Return how many entries each of ``n`` packed masks of equal size keeps, int64 ``(n,)``."""
    found = _ones(packed.device).index_select(0, packed.flatten().int())
    return found.view(n, len(found) // n).sum(dim=1)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return values, 0 where a mask is False, by bit operations: ``masked_fill`` branches at each entry on a CPU."""
    bits = mask.view(torch.int8).to(_INTEGERS[values.dtype.itemsize]).neg_()
    return bits.bitwise_and_(as_integers(values)).view(values.dtype)


def chosen(mask: Tensor, values: Tensor, others: Tensor) -> Tensor:
    """Return values where a mask is True, else others of the same dtype: ``torch.where`` without branches."""
    bits, other = mask.view(torch.int8).to(_INTEGERS[values.dtype.itemsize]).neg_(), as_integers(others)
    return bits.bitwise_and_(as_integers(values) ^ other).bitwise_xor_(other).view(values.dtype)


def as_integers(t: Tensor) -> Tensor:
    """Return a view of a tensor's bits as integers."""
    return t.view(_INTEGERS[t.dtype.itemsize])


@cache
def _ones(device: torch.device) -> Tensor:
    """Return how many bits of each byte are set."""
    return ((torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1).sum(dim=1).byte()


@cache
def _table(device: torch.device, dtype: torch.dtype, kept: bool = True) -> Tensor:
    """Return the unpacked entries of each byte of a packed mask: eight bools in an int64, or integers of ``dtype``."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    if dtype == torch.bool:
        return bits.bool().view(torch.int64).flatten()
    return (-bits if kept else bits - 1).to(dtype)


def encode(values: Tensor, dtype: StateDtype, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return values ``(..., n)`` in their stored form, and the exponents of float8 blocks ``(..., ⌈n/32⌉)``.

    Args:
        values: float32 or float64; with ``dtype`` float32 both are stored unchanged.
        dtype: The dtype to store them in; float8 is stored as uint8, which can be saved and sent everywhere.
        noise: Returns random int32 in the shape of ``values``, which decide whether to round up or down.
    """
    if dtype == "float32":
        return values, None
    if dtype == "bfloat16":
        return round_to_bfloat16(values, noise()), None
    return _round_to_float8(values, noise())


def decode(stored: Tensor, exponents: Tensor | None) -> Tensor:
    """Return the values that :func:`encode` stored, in at least float32."""
    if exponents is not None:
        if on_host(stored):
            values = _float8(stored.device).index_select(0, stored.flatten().int()).view(stored.shape)
        else:
            values = stored.view(torch.float8_e4m3fn).float()
        blocks = _split(values, BLOCK)
        return (blocks * _power_of_two(exponents[..., None])).flatten(-2)[..., : stored.shape[-1]]
    return stored.float() if stored.dtype == torch.bfloat16 else stored


def round_to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Return values rounded stochastically to bfloat16, exact in the mean.

    Args:
        values: Any floats.
        noise: Random int32 in their shape; it is overwritten.
    """
    values = values.float()
    bits = noise.bitwise_and_(0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    rounded = bits.view(torch.float32).add_(values.clamp(-1, 1), alpha=0)  # adds 0, or NaN, whose bits overflowed to 0
    return rounded.to(torch.bfloat16)


def _round_to_float8(values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return values as bytes of float8_e4m3fn, and one int8 exponent a block.

    Scales are powers of two, so that representable values stay representable when the scale changes: storing an
    unchanged entry again gives the same value, without new noise.

    Rounding has two steps, each exact in the mean: to three bits of mantissa, then to a multiple of the spacing of
    subnormals, which changes only these.
    """
    blocks = _split(values.float(), BLOCK)
    largest = blocks.abs().amax(dim=-1)
    exponent = torch.frexp(largest / _LARGEST).exponent.clamp(-126, 126)
    fits = _power_of_two(exponent) * (_LARGEST / 2) >= largest
    exponent = (exponent - fits.int()).clamp(-126, 126)  # so that values rounded before stay representable
    scaled = blocks * _power_of_two(-exponent[..., None])
    noise = _split(noise, BLOCK)
    near = (noise & ((1 << _DROPPED) - 1)).add_(scaled.view(torch.int32)).bitwise_and_(-1 << _DROPPED)
    dither = (noise >> (_DROPPED - 1)).bitwise_or_(1)  # odd, to avoid ties; 13 bits with the sign
    rounded = near.view(torch.float32).add_(dither, alpha=_SPACING / (1 << 13)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).flatten(-2)[..., : values.shape[-1]].contiguous(), exponent.to(torch.int8)


@cache
def _float8(device: torch.device) -> Tensor:
    """Return the value of each byte of float8_e4m3fn: on a CPU this table is faster than torch's conversion."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2 to the power of integers from -126 to 127, exactly: ldexp is inexact on devices that use pow for it."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _split(values: Tensor, size: int) -> Tensor:
    """Return rows ``(..., n)`` as groups ``(..., ⌈n/size⌉, size)``, padded with 0."""
    missing = -values.shape[-1] % size
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // size, size)
