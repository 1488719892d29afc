"""Checkpoints (`rlcore.checkpoint.rank_files`) of blocks of the global tensors that `sharded_state` describes.

The manifest names each rank's blocks. Any layout can load it: each rank reads whatever overlaps with its own blocks.
They lie in the ranks' own safetensors files, or in Megatron's (`rlcore_megatron.torch_dist`). Neither is read by
Megatron's reader: its ``.metadata`` is a pickle, which reading would execute.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from rlcore.checkpoint.rank_files import MANIFEST
from rlcore.errors import CheckpointError
from rlcore_megatron import torch_dist
from rlcore_megatron.blocks import overlap

FORMAT = 2


class Reader:
    """Blocks of the global tensors, put together from those that were saved.

    Raises:
        CheckpointError: this version does not know the files that ``manifest`` speaks of.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path = path
        known = {"safetensors": _read_overlap, torch_dist.BACKEND: torch_dist.read_overlap}
        if manifest["files_format"] not in known:
            raise CheckpointError(f"{path} has files of the unknown format {manifest['files_format']!r}")
        self._read_overlap: Callable[..., Any] = known[manifest["files_format"]]
        self._saved: dict[str, list[tuple[Sequence[Any], tuple[int, ...]]]] = {}
        for where, key, offset in (block for blocks in manifest["ranks"] for block in blocks):
            self._saved.setdefault(key, []).append((where, tuple(offset)))

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
        for where, start in self._saved.get(key, ()):
            try:
                common = self._read_overlap(self._path, where, start, offset, into.shape)
            except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{self._path / where[0]} is missing or damaged: {error}") from error
            if common is not None:
                values, ours = common
                into[ours] = values.to(into.dtype)
                found += values.numel()
        if found != into.numel() and not padded:
            raise CheckpointError(f"{self._path / MANIFEST} is damaged: it names {found} of {into.numel()} of {key}")


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, by rank. Values are plain data made by us."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _read_overlap(
    folder: Path, where: tuple[str, str], start: Sequence[int], offset: Sequence[int], size: torch.Size
) -> tuple[torch.Tensor, tuple[slice, ...]] | None:
    """See `torch_dist.read_overlap`; ``where`` is a safetensors file and a name in it."""
    file, name = where
    with safe_open(folder / file, "pt") as tensors:
        piece = tensors.get_slice(name)
        both = overlap(start, piece.get_shape(), offset, size)
        if both is None:
            return None
        theirs, ours = both
        return (piece[theirs] if theirs else tensors.get_tensor(name)), ours
