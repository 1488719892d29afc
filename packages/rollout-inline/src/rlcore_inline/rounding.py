"""Elementwise functions that round a value in the same way wherever in a tensor it stands.

torch computes whole vectors of a tensor with one implementation of exp or log and what remains of it with another,
which may differ in the last bit; so where a row's number stands would decide about its bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LANES = 32
"""A multiple of the elements that torch's CPU kernels take at once in float32 (two vectors of AVX-512)."""


def in_whole_vectors(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """``function(values)``, elementwise, every value computed in whole vectors of its own."""
    return function(values[..., None].repeat(*[1] * values.dim(), LANES))[..., 0]
