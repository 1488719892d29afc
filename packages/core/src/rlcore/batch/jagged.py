"""`Jagged`: sequences of different lengths, stored one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rlcore.batch.memory import PickledTensor, dtype_name
from rlcore.errors import BatchError


@dataclass(frozen=True, eq=False, repr=False)
class Jagged:
    """A per-token column.

    Attributes:
        values: ``[T, ...]``, any dtype and device.
        lengths: ``[B]`` int64 on the CPU, summing to ``T``.

    Raises:
        BatchError: ``lengths`` is not one row of non-negative integers, or does not sum to ``T``.
    """

    values: torch.Tensor
    lengths: torch.Tensor

    def __post_init__(self) -> None:
        lengths = _as_lengths(self.lengths)
        object.__setattr__(self, "lengths", lengths)
        if self.values.dim() == 0 or int(lengths.sum()) != len(self.values):
            raise BatchError(f"lengths sum to {int(lengths.sum())} but values has shape {list(self.values.shape)}")

    @classmethod
    def from_list(cls, rows: Sequence[torch.Tensor | Sequence[Any]], dtype: torch.dtype | None = None) -> Jagged:
        """Join one tensor (or list of numbers) per sample.

        Args:
            dtype: of the values; None takes that of the rows, which must agree.
        """
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        if any(isinstance(row, torch.Tensor) for row in rows):
            tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
            dtypes = {tensor.dtype for tensor in tensors}
            if len(dtypes) > 1:
                found = " and ".join(sorted(map(dtype_name, dtypes)))
                raise BatchError(f"rows are {found}; pass dtype= to say which one is meant")
            return cls(torch.cat(tensors), lengths)
        # in one go: row by row, an empty list would turn integers into floats
        return cls(torch.as_tensor([value for row in rows for value in row], dtype=dtype), lengths)

    @classmethod
    def from_padded(cls, padded: torch.Tensor, lengths: torch.Tensor | Sequence[int]) -> Jagged:
        """Take the first ``lengths[i]`` entries of each row of ``padded`` ``[B, S, ...]``."""
        lengths = _as_lengths(lengths)
        if padded.dim() < 2 or len(lengths) != len(padded) or (lengths > padded.shape[1]).any():
            longest = f", longest {int(lengths.max())}," if len(lengths) else ""
            raise BatchError(
                f"lengths of shape {list(lengths.shape)}{longest} do not fit padded rows of shape {list(padded.shape)}"
            )
        keep = torch.arange(padded.shape[1])[None] < lengths[:, None]
        return cls(padded[keep.to(padded.device)], lengths)

    @classmethod
    def from_mask(cls, padded: torch.Tensor, mask: torch.Tensor) -> Jagged:
        """Take the entries of ``padded`` ``[B, S, ...]`` where ``mask`` ``[B, S]`` is not 0: padding on any side."""
        if mask.dim() != 2 or padded.shape[:2] != mask.shape:
            raise BatchError(f"a mask of shape {list(mask.shape)} does not fit rows of shape {list(padded.shape)}")
        keep = mask.bool()
        return cls(padded[keep.to(padded.device)], keep.sum(1))

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Jagged({dtype_name(self.values.dtype)} {list(self.values.shape)} over {len(self)} sequences)"

    @cached_property
    def offsets(self) -> torch.Tensor:
        """``[B + 1]`` int64: sequence *i* is ``values[offsets[i]:offsets[i + 1]]``."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def to_list(self) -> list[torch.Tensor]:
        """Return one view per sample."""
        return list(torch.split(self.values, self.lengths.tolist()))

    def to_padded(self, value: float = 0, *, left: bool = False) -> torch.Tensor:
        """``[B, max(lengths), ...]``, padded with ``value`` on the right or left."""
        width = int(self.lengths.max()) if len(self) else 0
        padded = self.values.new_full((len(self), width, *self.values.shape[1:]), value)
        place, lengths = torch.arange(width)[None], self.lengths[:, None]
        keep = place >= width - lengths if left else place < lengths
        padded[keep.to(self.values.device)] = self.values
        return padded

    def with_values(self, values: torch.Tensor) -> Jagged:
        """Return the same sequences with other values ``[T, ...]``."""
        return Jagged(values, self.lengths)

    def take(self, indices: torch.Tensor) -> Jagged:
        """Return the sequences at ``indices`` (``[N]`` int64, CPU, not negative), in that order, copied."""
        return Jagged(self.values[self.positions(indices).to(self.values.device)], self.lengths[indices])

    def positions(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the positions in `values` of the sequences at ``indices`` (as in `take`): int64, CPU."""
        lengths = self.lengths[indices]
        shift = self.offsets[indices] - (lengths.cumsum(0) - lengths)
        return torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return Jagged, (PickledTensor(self.values), PickledTensor(self.lengths))


Column = torch.Tensor | Jagged | list[Any]
"""A column of a batch: dense ``[B, ...]``, per token, or plain values."""


def _as_lengths(given: torch.Tensor | Sequence[int]) -> torch.Tensor:
    lengths = torch.as_tensor(given)
    integral = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if lengths.dim() != 1 or (len(lengths) and (not integral or bool((lengths < 0).any()))):
        raise BatchError(
            f"lengths must be one row of non-negative integers, not {dtype_name(lengths.dtype)} of shape "
            f"{list(lengths.shape)}" + (f" with {lengths.min().item()}" if integral and lengths.numel() else "")
        )
    return lengths.to("cpu", torch.int64)
