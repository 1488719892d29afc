"""The KV cache: one preallocated block of memory for each layer, viewed as rows of equal width.

A row is a running sequence, a column a position. Running sequences always fill the first rows, so that every operation
of a decoding step is on one dense view. Width and number of rows share the same memory: ``rows * width <= budget``. A
change of the width moves the rows in place, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

BLOCK = 64
"""Widths are multiples of this many positions."""


def whole_blocks(tokens: int) -> int:
    """Return ``tokens`` rounded up to a multiple of `BLOCK`."""
    return -(-tokens // BLOCK) * BLOCK


@dataclass(frozen=True)
class LayerShape:
    """Shape of what one layer caches per position: keys ``[heads, key_dim]`` and values ``[heads, value_dim]``."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Memory of one position, in bytes."""
        return self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class KVCache:
    """Keys and values of all layers for the running sequences.

    Args:
        shapes: one per layer.
        budget: positions in the cache, over all rows.
    """

    def __init__(self, shapes: Sequence[LayerShape], budget: int, device: torch.device) -> None:
        self.shapes = shapes
        self.budget = budget
        self.width = BLOCK
        self._keys = [_zeros(budget * s.heads * s.key_dim, s.dtype, device) for s in shapes]
        self._values = [_zeros(budget * s.heads * s.value_dim, s.dtype, device) for s in shapes]

    @property
    def rows(self) -> int:
        """Number of rows at the present width."""
        return self.budget // self.width

    def view(self, layer: int, rows: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
        """View the first rows: keys ``[rows, heads, span, key_dim]``, values ``[rows, heads, span, value_dim]``."""
        shape = self.shapes[layer]
        keys = _grid(self._keys[layer], rows, shape.heads, self.width, shape.key_dim)
        values = _grid(self._values[layer], rows, shape.heads, self.width, shape.value_dim)
        return keys[:, :, :span], values[:, :, :span]

    def flat(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """View keys and values as ``[budget * heads, dim]``; see `flat_index`."""
        shape = self.shapes[layer]
        return self._keys[layer].view(-1, shape.key_dim), self._values[layer].view(-1, shape.value_dim)

    def flat_index(self, positions: torch.Tensor, heads: int) -> torch.Tensor:
        """Return indices ``[rows * heads]`` into `flat`: of position ``positions[r]``, for every row *r* and head."""
        row_heads = torch.arange(len(positions) * heads, device=positions.device).view(-1, heads)
        return (row_heads * self.width + positions[:, None]).view(-1)

    def write_prompts(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store ``[N, heads, length, dim]`` at the beginning of ``rows`` ``[N]``."""
        all_keys, all_values = self.view(layer, self.rows, keys.shape[2])
        all_keys[rows] = keys
        all_values[rows] = values

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Copy the first ``length`` positions of rows ``source`` ``[N]`` to rows ``target`` ``[N]``."""
        for layer in range(len(self.shapes)):
            for grid in self.view(layer, self.rows, length):
                grid[target] = grid[source]

    def resize(self, width: int, rows: int, length: int) -> None:
        """Change the width and keep the first ``length`` positions of the first ``rows`` rows."""
        assert rows * width <= self.budget
        old = self.width
        for storages, dims in (
            (self._keys, [shape.key_dim for shape in self.shapes]),
            (self._values, [shape.value_dim for shape in self.shapes]),
        ):
            for storage, shape, dim in zip(storages, self.shapes, dims):
                kept = _grid(storage, rows, shape.heads, old, dim)[:, :, :length].clone()
                _grid(storage, rows, shape.heads, width, dim)[:, :, :length] = kept
        self.width = width


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate ``[count]`` zeros: masked positions enter attention as 0 · value, so they must not hold NaN.

    On the CPU the operating system allocates pages when they are written.
    """
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype)
    return torch.zeros(count, dtype=dtype, device=device)


def _grid(storage: torch.Tensor, rows: int, heads: int, width: int, dim: int) -> torch.Tensor:
    return storage[: rows * heads * width * dim].view(rows, heads, width, dim)
