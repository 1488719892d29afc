"""Which samples are meant: indices and masks, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlcore.batch.memory import dtype_name
from rlcore.errors import BatchError


def sample_indices(indices: torch.Tensor | Sequence[int], size: int) -> torch.Tensor:
    """``indices`` of samples, negative ones counted from the end, as ``[n]`` int64 from 0 to ``size`` (exclusive).

    Raises:
        BatchError: they are no row of integers, or one is outside.
    """
    index = torch.as_tensor(indices).cpu()
    integral = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if index.dim() != 1 or not (integral or len(index) == 0):
        hint = "; use filter for a mask" if index.dtype == torch.bool else ""
        raise BatchError(
            f"indices must be one row of integers, not {dtype_name(index.dtype)} of shape {list(index.shape)}{hint}"
        )
    index = index.to(torch.int64)
    outside = index[(index < -size) | (index >= size)]
    if len(outside):
        raise BatchError(f"index {int(outside[0])} is outside a batch of {size} samples")
    return torch.where(index < 0, index + size, index)


def kept_samples(mask: torch.Tensor | Sequence[bool], size: int) -> torch.Tensor:
    """``[n]`` int64: where ``mask`` is true.

    Raises:
        BatchError: it is not one bool for each of ``size`` samples.
    """
    keep = torch.as_tensor(mask).cpu()
    if keep.shape != (size,) or (keep.dtype != torch.bool and len(keep)):
        raise BatchError(
            f"the mask is {dtype_name(keep.dtype)} of shape {list(keep.shape)}; one bool for each of the "
            f"{size} samples is needed"
        )
    return keep.nonzero().flatten()
