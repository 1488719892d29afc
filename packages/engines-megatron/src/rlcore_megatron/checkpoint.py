"""Checkpoints (`rlcore.checkpoint.rank_files`) of blocks of the global tensors that `sharded_state` describes.

The manifest names each rank's blocks. Any layout can load it: each rank reads whatever overlaps with its own blocks.

Megatron's own writer is not used: its ``.metadata`` is a pickle, which reading would execute, it differs from one save
to the next, and its background writer is a spawned process. The description of the layout is Megatron's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from rlcore.checkpoint.rank_files import MANIFEST, rank_file
from rlcore.errors import CheckpointError

FORMAT = 1
Block = tuple[str, str, tuple[int, ...]]
"""Name in the file, key of the global tensor, offset in it."""


class Reader:
    """Blocks of the global tensors, put together from those that were saved."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path = path
        self._saved: dict[str, list[Block]] = {}
        for rank, blocks in enumerate(manifest["ranks"]):
            for name, key, offset in blocks:
                self._saved.setdefault(key, []).append((rank_file(rank), name, tuple(offset)))

    def fill(self, key: str, offset: tuple[int, ...], into: torch.Tensor, padded: bool) -> None:
        """Copy what was saved of ``key`` at ``offset`` into a tensor on the CPU.

        Args:
            padded: rows may be missing at the end of the first dimension; they become 0.

        Raises:
            CheckpointError: a file is missing or damaged, or something was not saved.
        """
        found = 0
        if padded:
            into.zero_()
        for file, name, start in self._saved.get(key, ()):
            try:
                with safe_open(self._path / file, "pt") as tensors:
                    piece = tensors.get_slice(name)
                    overlap = _overlap(start, piece.get_shape(), offset, into.shape)
                    if overlap is None:
                        continue
                    theirs, ours = overlap
                    values = piece[theirs] if theirs else tensors.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self._path / file} is missing or damaged: {error}") from error
            into[ours] = values.to(into.dtype)
            found += values.numel()
        if found != into.numel() and not padded:
            raise CheckpointError(f"{self._path / MANIFEST} is damaged: it names {found} of {into.numel()} of {key}")

    def random_states(self, rank: int) -> tuple[dict[str, torch.Tensor], str]:
        """The random states of ``rank`` (of another one where there were fewer ranks)."""
        files = sorted(self._path.glob("rank-*.safetensors"))
        file = files[rank % len(files)]
        try:
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if name.startswith("random/")]  # noqa: SIM118
                return {name: tensors.get_tensor(name) for name in names}, tensors.metadata()["random"]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, by rank. Values are plain data made by us."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _overlap(
    start: Sequence[int], size: Sequence[int], other_start: Sequence[int], other_size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes meet, within the first and within the second; None if nowhere."""
    low = [max(a, b) for a, b in zip(start, other_start)]
    high = [min(a + n, b + m) for a, n, b, m in zip(start, size, other_start, other_size)]
    if any(a >= b for a, b in zip(low, high)):
        return None
    first = tuple(slice(a - origin, b - origin) for a, b, origin in zip(low, high, start))
    second = tuple(slice(a - origin, b - origin) for a, b, origin in zip(low, high, other_start))
    return first, second
