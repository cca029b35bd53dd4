"""How the ADMM state is kept: in float32, bfloat16 or block-scaled float8, and the mask in one bit a weight.

Rounding to fewer bits is stochastic: up or down with the probabilities that make the mean exact. The dual grows
by steps far below half a unit of its last place; rounded to nearest each of them would be lost and the dual
would stand still, while the mean of stochastic rounding moves as the exact dual does.

Bits and blocks run along rows, so that what is stored of a row depends on that row alone and shards as it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from elsa_lightning.errors import UserError

StateDtype = Literal["float32", "bfloat16", "float8_e4m3fn"]

BLOCK = 32  # entries that share a power-of-two scale, as in the OCP microscaling formats
_LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_NORMAL, _SPACING = 2.0**-6, 2.0**-9
_DROPPED = 20  # of float32's 23 bits of mantissa


def check_state_dtype(name: str) -> StateDtype:
    """Return ``name``; raise ValueError if it is no dtype the state can be kept in."""
    if name not in get_args(StateDtype):
        raise UserError(f"state_dtype must be one of {get_args(StateDtype)}, got {name!r}")
    return cast(StateDtype, name)


def pack(mask: Tensor) -> Tensor:
    """Return a bool mask ``(..., n)`` as bytes ``(..., ⌈n/8⌉)``, the first entry of each row in the lowest bit."""
    bits = _split(mask.to(torch.uint8), 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, n: int) -> Tensor:
    """Return the bool mask ``(..., n)`` that :func:`pack` packed."""
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten(-2)[..., :n].to(torch.bool)


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
        blocks = _split(stored.view(torch.float8_e4m3fn).float(), BLOCK)
        return (blocks * _power_of_two(exponents[..., None])).flatten(-2)[..., : stored.shape[-1]]
    return stored.float() if stored.dtype == torch.bfloat16 else stored


def round_to_bfloat16(values: Tensor, noise: Tensor) -> Tensor:
    """Return values rounded up or down to bfloat16 as ``noise``, random int32, decides: exact in the mean."""
    values = values.float()
    bits = (noise & 0xFFFF).add_(values.view(torch.int32))
    rounded = bits.bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)  # NaN's bits would run over to 0


def _round_to_float8(values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return values as the bytes of float8_e4m3fn and one int8 exponent a block.

    Scales are powers of two so that what is representable stays so when the scale moves: storing an entry
    again that did not change gives the same bits, without new noise.
    """
    blocks = _split(values.float(), BLOCK)
    largest = blocks.abs().amax(dim=-1)
    exponent = torch.frexp(largest / _LARGEST).exponent.clamp(-126, 126)
    fits = _power_of_two(exponent) * (_LARGEST / 2) >= largest
    exponent = (exponent - fits.int()).clamp(-126, 126)  # so that values that were rounded before are representable
    scaled = blocks * _power_of_two(-exponent[..., None])
    noise = _split(noise & ((1 << _DROPPED) - 1), BLOCK)
    subnormal = torch.add(noise * (_SPACING / (1 << _DROPPED)), scaled).div_(_SPACING).floor_().mul_(_SPACING)
    normal = noise.add_(scaled.view(torch.int32)).bitwise_and_(-1 << _DROPPED).view(torch.float32)
    rounded = torch.where(scaled.abs() < _SMALLEST_NORMAL, subnormal, normal).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).flatten(-2)[..., : values.shape[-1]].contiguous(), exponent.to(torch.int8)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2 to an integer from -126 to 127, exactly on any device: some compute ldexp through pow."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _split(values: Tensor, size: int) -> Tensor:
    """Return rows ``(..., n)`` as pieces ``(..., ⌈n/size⌉, size)``, filled up with 0."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % size))
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // size, size)
