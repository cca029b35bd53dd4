"""How the ADMM state is kept: in float32, bfloat16 or block-scaled float8, and the mask in one bit a weight.

Rounding to fewer bits is stochastic: up or down with the probabilities that make the mean exact. The dual grows
by steps far below half a unit of its last place; rounded to nearest each of them would be lost and the dual
would stand still, while the mean of stochastic rounding moves as the exact dual does.

Bits and blocks run along rows, so that what is stored of a row depends on that row alone and shards as it does.
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
_LARGEST = 448.0  # of float8_e4m3fn
_SPACING = 2.0**-9  # of its subnormals
_DROPPED = 20  # of float32's 23 bits of mantissa
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1 it has these as the bits of its highest byte
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_state_dtype(name: str) -> StateDtype:
    """Return ``name``; raise ValueError if it is no dtype the state can be kept in."""
    if name not in get_args(StateDtype):
        raise UserError(f"state_dtype must be one of {get_args(StateDtype)}, got {name!r}")
    return cast(StateDtype, name)


def pack(mask: Tensor) -> Tensor:
    """Return a bool mask ``(..., n)`` as bytes ``(..., ⌈n/8⌉)``, the first entry of each row in the lowest bit."""
    eight = _split(mask, 8).contiguous().view(torch.int64).squeeze(-1)  # a byte each, 0 or 1
    return ((eight * _GATHER) >> 56).to(torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """Return the bool mask ``(..., n)`` that :func:`pack` packed."""
    if not on_host(packed):  # where looking up is slow
        bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)).bitwise_and_(1)
        return bits.view(torch.bool).flatten(-2)[..., :n]
    eight = _table(packed.device, torch.bool).index_select(0, packed.flatten().int())
    return eight.view(torch.bool).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :n]


def unpack_wide(packed: Tensor, n: int, dtype: torch.dtype, kept: bool) -> Tensor:
    """Return integers ``(..., n)`` as wide as a dtype, all bits set where the mask that was packed is ``kept``, or not.

    What is masked with them as integers is itself there and 0 elsewhere, in one pass.
    """
    bits = _table(packed.device, _INTEGERS[dtype.itemsize], kept).index_select(0, packed.flatten().int())
    return bits.view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :n]


def ones(packed: Tensor, n: int) -> Tensor:
    """Return how many entries each of ``n`` masks of equal size that were packed keeps, int64 ``(n,)``."""
    found = _ones(packed.device).index_select(0, packed.flatten().int())
    return found.view(n, len(found) // n).sum(dim=1)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return values, 0 where a mask is False: by their bits, since a CPU branches at each entry for ``masked_fill``."""
    bits = mask.view(torch.int8).to(_INTEGERS[values.dtype.itemsize]).neg_()
    return bits.bitwise_and_(as_integers(values)).view(values.dtype)


def chosen(mask: Tensor, values: Tensor, others: Tensor) -> Tensor:
    """Return values where a mask is True, else others, of the same dtype: ``torch.where`` without branches."""
    bits, other = mask.view(torch.int8).to(_INTEGERS[values.dtype.itemsize]).neg_(), as_integers(others)
    return bits.bitwise_and_(as_integers(values) ^ other).bitwise_xor_(other).view(values.dtype)


def as_integers(t: Tensor) -> Tensor:
    """Return a tensor's bits as integers, in the same memory."""
    return t.view(_INTEGERS[t.dtype.itemsize])


@cache
def _ones(device: torch.device) -> Tensor:
    """Return how many bits of each byte are set."""
    return ((torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1).sum(dim=1).byte()


@cache
def _table(device: torch.device, dtype: torch.dtype, kept: bool = True) -> Tensor:
    """Return what each byte of a packed mask stands for: bools, eight in an int64, or eight integers of ``dtype``."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    if dtype == torch.bool:
        return bits.bool().view(torch.int64).flatten()
    return (-bits if kept else bits - 1).to(dtype)


def encode(values: Tensor, dtype: StateDtype, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return values ``(..., n)`` as they are stored, and the exponents of float8 blocks ``(..., ⌈n/32⌉)``.

    Args:
        values: float32 or float64, the latter kept as it is with ``dtype`` float32.
        dtype: What to keep them in; float8 is stored as its bytes, which every way of saving and sending takes.
        noise: Makes random int32 of the shape of ``values``, which decide which way to round.
    """
    if dtype == "float32":
        return values, None
    if dtype == "bfloat16":
        return round_to_bfloat16(values, noise()), None
    return _round_to_float8(values, noise())


def decode(stored: Tensor, exponents: Tensor | None) -> Tensor:
    """Return what :func:`encode` stored, in at least float32."""
    if exponents is not None:
        if on_host(stored):
            values = _float8(stored.device).index_select(0, stored.flatten().int()).view(stored.shape)
        else:
            values = stored.view(torch.float8_e4m3fn).float()
        blocks = _split(values, BLOCK)
        return (blocks * _power_of_two(exponents[..., None])).flatten(-2)[..., : stored.shape[-1]]
    return stored.float() if stored.dtype == torch.bfloat16 else stored


def round_to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Return values rounded up or down to bfloat16 as ``noise`` decides: exact in the mean.

    Args:
        values: Any floats.
        noise: Random int32 of their shape, which is used up.
    """
    values = values.float()
    bits = noise.bitwise_and_(0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-1 << 16)
    rounded = bits.view(torch.float32).add_(values.clamp(-1, 1), alpha=0)  # 0, or NaN, whose bits would run over to 0
    return rounded.to(torch.bfloat16)


def _round_to_float8(values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return values as the bytes of float8_e4m3fn and one int8 exponent a block.

    Scales are powers of two so that what is representable stays so when the scale moves: storing an entry
    again that did not change gives the same bits, without new noise.

    Rounding is in two steps, each exact in the mean: to three bits of mantissa, then, which changes only subnormals,
    to a multiple of their spacing.
    """
    blocks = _split(values.float(), BLOCK)
    largest = blocks.abs().amax(dim=-1)
    exponent = torch.frexp(largest / _LARGEST).exponent.clamp(-126, 126)
    fits = _power_of_two(exponent) * (_LARGEST / 2) >= largest
    exponent = (exponent - fits.int()).clamp(-126, 126)  # so that values that were rounded before are representable
    scaled = blocks * _power_of_two(-exponent[..., None])
    noise = _split(noise, BLOCK)
    near = (noise & ((1 << _DROPPED) - 1)).add_(scaled.view(torch.int32)).bitwise_and_(-1 << _DROPPED)
    dither = (noise >> (_DROPPED - 1)).bitwise_or_(1)  # odd, so that nothing is half way; 13 bits with their sign
    rounded = near.view(torch.float32).add_(dither, alpha=_SPACING / (1 << 13)).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).flatten(-2)[..., : values.shape[-1]].contiguous(), exponent.to(torch.int8)


@cache
def _float8(device: torch.device) -> Tensor:
    """Return what each byte of float8_e4m3fn stands for: on a CPU looking them up is faster than torch's conversion."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2 to an integer from -126 to 127, exactly on any device: some compute ldexp through pow."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _split(values: Tensor, size: int) -> Tensor:
    """Return rows ``(..., n)`` as pieces ``(..., ⌈n/size⌉, size)``, filled up with 0."""
    missing = -values.shape[-1] % size
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // size, size)
