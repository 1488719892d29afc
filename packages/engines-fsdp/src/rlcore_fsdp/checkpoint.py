"""Checkpoints (`rlcore_kit.checkpoint.rank_files`) of the rows of every weight and optimizer state that a rank owns.

The manifest names the rows of each rank. Any number of ranks can load them: each reads the rows that it needs from the
files that hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from rlcore.boundary import boundary
from rlcore.engines.settings import Head
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint import random_states
from rlcore_kit.checkpoint.base_model import Frozen, Lora
from rlcore_kit.checkpoint.json_file import Count
from rlcore_kit.checkpoint.rank_files import MANIFEST, RankManifest, RankPart, rank_file
from rlcore_kit.checkpoint.rank_files import check_shapes as check_same_shapes

FORMAT: Final = 2


def _in_order(rows: tuple[int, int]) -> tuple[int, int]:
    if rows[0] >= rows[1]:
        raise ValueError(f"{rows[0]} to {rows[1]} is no range of rows")
    return rows


Rows = Annotated[tuple[Count, Count], AfterValidator(_in_order)]
"""The first row, and the row after the last."""


class Manifest(RankManifest):
    """Contents of ``checkpoint.json``. Tensors are named "weight/…" and, for moments of the optimizer, "exp_avg/…"."""

    format: Literal[2] = FORMAT
    engine: Literal["fsdp"] = "fsdp"
    head: Head = Field(description="Head of the model.")
    lora: Lora | None = Field(description="The adapters that are trained; null if all weights are.")
    frozen: Frozen | None = Field(None, description="The frozen weights; null if all weights are trained.")
    adam_steps: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        description="Steps of the optimizer for each weight."
    )
    ranks: list[dict[str, Rows]] = Field(
        min_length=1, description="For each rank the rows of each tensor that it wrote."
    )

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        if (self.lora is None) != (self.frozen is None):
            raise ValueError("lora and frozen must be given together")
        for name, rows in ((name, rows) for rank in self.ranks for name, rows in rank.items()):
            shape = self.shapes.get(name)
            if shape is None or rows[1] > (shape[0] if shape else 1):
                raise ValueError(f"the rows {rows[0]} to {rows[1]} of {name} are outside of its shape {shape}")
        return self


@dataclass(frozen=True)
class RowRange:
    """The rows ``[start, stop)`` of a tensor of ``shape`` that this rank owns, with a live view of them.

    ``writes`` is False if another rank has the same rows and writes them.
    """

    local: torch.Tensor
    start: int
    stop: int
    shape: tuple[int, ...]
    writes: bool


def row_range(tensor: torch.Tensor, rank: int) -> RowRange:
    """Return the rows of ``tensor``, which is plain or sharded by rows, on this rank."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return RowRange(tensor, 0, shape[0] if shape else 1, shape, rank == 0)
    mesh = tensor.device_mesh["shard"]
    height = -(-shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * height, shape[0])
    stop = min(start + height, shape[0])
    local = tensor.to_local()
    assert len(local) == stop - start, "FSDP2 shards by rows, in equal chunks"
    first_replica = tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank("replicate") == 0
    return RowRange(local, start, stop, shape, first_replica)


def rank_part(tensors: Mapping[str, torch.Tensor], rank: int) -> RankPart:
    """Return this rank's part of ``tensors`` (live views), with its current random states."""
    held: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        own = row_range(tensor, rank)
        if own.writes and own.stop > own.start:
            held[name] = own.local.detach()
            rows[name] = (own.start, own.stop)
    states, text = random_states.collect()
    return RankPart({**held, **states}, rows, text)


def check_shapes(path: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare the shapes in a checkpoint with those of ``weights`` (named "weight/…").

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    prefix = "weight/"
    saved = {name.removeprefix(prefix): n for name, n in manifest.shapes.items() if name.startswith(prefix)}
    check_same_shapes(path, saved, {name.removeprefix(prefix): w.shape for name, w in weights.items()})


def read(path: Path, manifest: Manifest, wanted: Mapping[str, RowRange]) -> dict[str, torch.Tensor]:
    """Read the rows of every wanted range into new CPU tensors.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    values = {name: torch.empty(part.local.shape, dtype=part.local.dtype) for name, part in wanted.items()}
    found = dict.fromkeys(wanted, 0)
    for rank, held in enumerate(manifest.ranks):
        here = [
            (name, part, *held[name])
            for name, part in wanted.items()
            if name in held and held[name][0] < part.stop and part.start < held[name][1]
        ]
        if not here:
            continue
        file = path / rank_file(rank)
        with boundary(f"{file} is missing or damaged", CheckpointError), safe_open(file, "pt") as tensors:
            for name, part, start, stop in here:
                rows = tensors.get_tensor(name)
                if rows.shape != (stop - start, *part.shape[1:])[: len(part.shape)]:
                    raise CheckpointError(f"{file} is damaged: {name} has shape {list(rows.shape)}")
                low, high = max(start, part.start), min(stop, part.stop)
                found[name] += high - low
                if part.shape:
                    values[name][low - part.start : high - part.start] = rows[low - start : high - start]
                else:
                    values[name].copy_(rows)
    for name, part in wanted.items():
        if found[name] != part.stop - part.start:
            raise CheckpointError(f"{path / MANIFEST} is damaged: it names {found[name]} rows of {name} for this rank")
    return values
