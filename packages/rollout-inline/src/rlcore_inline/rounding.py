"""Elementwise functions whose rounding does not depend on the position of a value in its tensor.

torch computes full vectors of a tensor with one implementation of exp or log and the remainder with another, which may
differ in the last bit. The bits of a row's result would then depend on the row's position.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LANES = 32
"""A multiple of the float32 elements that torch's CPU kernels process together (two vectors of AVX-512)."""


def position_independent(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """Apply the elementwise ``function`` to ``values``, with separate full vectors for every value."""
    return function(values[..., None].repeat(*[1] * values.dim(), LANES))[..., 0]
