"""Random numbers of a request: draw *i* of a seed is a pure function of *i* and the seed.

The *i*-th output of the generator SplitMix64 (Steele, Lea & Flood, 2014) is ``mix(start + (i + 1) · γ)``, so any draw
can be computed without the previous ones, for all rows of a batch together and on any device.
"""

from __future__ import annotations

from hashlib import blake2b

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def stream_start(seed: int) -> int:
    """Return the start of the stream of ``seed`` (any integer) as a signed 64-bit number.

    The seed is hashed, so that streams of consecutive seeds do not overlap.
    """
    digest = blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniforms(starts: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return draw number ``draws`` ``[R]`` of the streams ``starts`` ``[R]`` (both int64).

    Integer arithmetic wraps around, so the result is the same on every device.

    Returns:
        ``[R]`` float64 in [0, 1), multiples of 2⁻⁵².
    """
    return _shift_right(splitmix64(starts, draws), 12).double() * 2.0**-52


def splitmix64(starts: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return output number ``draws`` of SplitMix64 started at ``starts``, as signed int64."""
    z = starts + (draws + 1) * _signed(_GAMMA)
    z = (z ^ _shift_right(z, 30)) * _signed(_MULTIPLIERS[0])
    z = (z ^ _shift_right(z, 27)) * _signed(_MULTIPLIERS[1])
    return z ^ _shift_right(z, 31)


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift logically; torch's shift of int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
