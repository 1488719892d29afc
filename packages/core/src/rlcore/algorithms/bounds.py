"""Bounds on log-ratios: values stay finite, and what lies beyond still has a gradient that brings it back."""

from __future__ import annotations

from typing import Any

import torch

LOG_RATIO_LIMIT = 20.0  # exp(20) ≈ 5e8 is the largest ratio anything here computes


def bounded(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``values.clamp(low, high)`` with the gradient of ``values``.

    Under a plain clamp the gradient is 0 beyond the bounds: a token that is there would never be trained back. What is
    computed from the result has there the gradient that it has at the bound.
    """
    result: torch.Tensor = _Bounded.apply(values, low, high)  # type: ignore[no-untyped-call]
    return result


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return values.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0], None, None
