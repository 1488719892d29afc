"""Which samples are meant: indices, masks and ids of units, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def unit_ids(name: str, column: Any) -> list[int]:
    """Return the ids of the units that ``column`` divides the samples into: samples with the same id belong together.

    Raises:
        BatchError: the column is not one integer per sample.
    """
    if isinstance(column, torch.Tensor) and column.dim() == 1 and not column.is_floating_point():
        return column.tolist()
    kind = f"{dtype_name(column.dtype)} of shape {list(column.shape)}" if isinstance(column, torch.Tensor) else ""
    raise BatchError(
        f"column {name!r} cannot say which samples belong together: it must be dense, with one integer per sample"
        + (f", not {kind}" if kind else f", not a {type(column).__name__}")
    )


def check_split(units: Sequence[int], size: int, name: str) -> None:
    """See that batches of ``size`` consecutive samples hold whole units.

    Raises:
        BatchError: a unit would be divided.
    """
    part_of: dict[int, int] = {}
    for index, unit in enumerate(units):
        if part_of.setdefault(unit, index // size) != index // size:
            raise BatchError(
                f"batches of {size} samples would divide unit {unit} of column {name!r}, whose samples must stay "
                "together: choose a size that is a multiple of the units', and put the samples of a unit next to each "
                "other"
            )
