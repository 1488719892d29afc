"""Checkpoints (`rlcore_kit.checkpoint.rank_files`) of blocks of the global tensors that `sharded_state` describes.

The manifest names the blocks of each rank. Any layout can load them: each rank reads the saved blocks that overlap with
its own. They are in one safetensors file per rank, or in files of Megatron (`rlcore_megatron.torch_dist`). Megatron's
reader reads neither: its ``.metadata`` is a pickle, whose code reading would execute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field, model_validator
from safetensors import safe_open

from rlcore.boundary import boundary
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint.base_model import Frozen, Lora
from rlcore_kit.checkpoint.json_file import Count, FileName, Finite
from rlcore_kit.checkpoint.rank_files import MANIFEST, RankManifest
from rlcore_megatron import torch_dist
from rlcore_megatron.blocks import overlap
from rlcore_megatron.settings import CheckpointFormat

FORMAT: Final = 2

InRankFile = tuple[FileName, str]
"""A safetensors file, and the name of a tensor in it."""

Block = tuple[InRankFile | torch_dist.InBucket, str, tuple[Count, ...]]
"""Location in a file, key of the global tensor, and offset in that."""


class Manifest(RankManifest):
    """Contents of ``checkpoint.json``. ``shapes`` are those of the model's weights."""

    format: Literal[2] = FORMAT
    engine: Literal["megatron"] = "megatron"
    files_format: CheckpointFormat = Field(description="Format of the files with the blocks.")
    lora: Lora | None = Field(None, description="The adapters that are trained; null if all weights are.")
    frozen: Frozen | None = Field(None, description="The frozen weights; null if all weights are trained.")
    adam_step: Finite = Field(ge=0, description="Number of steps of the optimizer.")
    ranks: list[list[Block]] = Field(min_length=1, description="The blocks that each rank wrote.")

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        length = 2 if self.files_format == "safetensors" else 4
        for where, key, _ in (block for blocks in self.ranks for block in blocks):
            if len(where) != length or where[0] not in self.files:
                raise ValueError(f"a block of {key[:200]} is not in a {self.files_format} file of the checkpoint")
        return self


class Reader:
    """Reads blocks of the global tensors from the saved blocks that overlap with them."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        readers: dict[str, Callable[..., Any]] = {
            "safetensors": _read_overlap,
            torch_dist.BACKEND: torch_dist.read_overlap,
        }
        self._read_overlap = readers[manifest.files_format]
        self._saved: dict[str, list[tuple[InRankFile | torch_dist.InBucket, tuple[int, ...]]]] = {}
        for where, key, offset in (block for blocks in manifest.ranks for block in blocks):
            self._saved.setdefault(key, []).append((where, offset))

    def fill(self, key: str, offset: tuple[int, ...], into: torch.Tensor, padded: bool) -> None:
        """Copy the saved elements of ``key`` at ``offset`` into a tensor on the CPU.

        Args:
            into: the block to fill; its shape is the size of the block.
            padded: rows may be missing at the end of the first dimension; they become 0.

        Raises:
            CheckpointError: a file is missing or damaged, or elements were not saved.
        """
        found = 0
        if padded:
            into.zero_()
        for where, start in self._saved.get(key, ()):
            with boundary(f"{self._path / where[0]} is missing or damaged", CheckpointError):
                common = self._read_overlap(self._path, where, start, offset, into.shape)
                if common is not None:
                    values, ours = common
                    into[ours] = values.to(into.dtype)
                    found += values.numel()
        if found != into.numel() and not padded:
            raise CheckpointError(
                f"{self._path / MANIFEST} is damaged: it names {found} of {into.numel()} elements of a block of {key}"
            )


def _read_overlap(
    folder: Path, where: InRankFile, start: Sequence[int], offset: Sequence[int], size: torch.Size
) -> tuple[torch.Tensor, tuple[slice, ...]] | None:
    """Read the overlap of two blocks as `torch_dist.read_overlap` does; ``where`` is a file and a name in it."""
    file, name = where
    with safe_open(folder / file, "pt") as tensors:
        piece = tensors.get_slice(name)
        both = overlap(start, piece.get_shape(), offset, size)
        if both is None:
            return None
        theirs, ours = both
        return (piece[theirs] if theirs else tensors.get_tensor(name)), ours
