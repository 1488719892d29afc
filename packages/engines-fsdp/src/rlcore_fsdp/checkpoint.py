"""Checkpoints (`rlcore.checkpoint.rank_files`) of the rows of every weight and optimizer state that a rank owns.

The manifest names the rows of each rank. Any number of ranks can load it: each reads the rows that it needs from
whichever files hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from rlcore.checkpoint import random_states, rank_files
from rlcore.checkpoint.rank_files import MANIFEST, RankPart, rank_file
from rlcore.errors import CheckpointError

FORMAT = 2


@dataclass(frozen=True)
class Piece:
    """The rows ``[start, stop)`` of a tensor of ``shape`` that this rank owns, as a live view.

    ``writes`` is False where another rank holds the same rows and writes them.
    """

    local: torch.Tensor
    start: int
    stop: int
    shape: tuple[int, ...]
    writes: bool


def piece(tensor: torch.Tensor, rank: int) -> Piece:
    """How ``tensor``, a plain one or a shard by rows, lies on this rank."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(tensor, 0, shape[0] if shape else 1, shape, rank == 0)
    mesh = tensor.device_mesh["shard"]
    height = -(-shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * height, shape[0])
    stop = min(start + height, shape[0])
    local = tensor.to_local()
    assert len(local) == stop - start, "FSDP2 shards by rows, in equal chunks"
    first_replica = tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank("replicate") == 0
    return Piece(local, start, stop, shape, first_replica)


def part(tensors: Mapping[str, torch.Tensor], rank: int) -> RankPart:
    """This rank's part of ``tensors`` (live views), with its present random states."""
    held: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        own = piece(tensor, rank)
        if own.writes and own.stop > own.start:
            held[name] = own.local.detach()
            rows[name] = (own.start, own.stop)
    states, text = random_states.collect()
    return RankPart({**held, **states}, rows, text)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return rank_files.read_manifest(path, FORMAT, ("optimizer", "schedule_step", "adam_steps"))


def check_shapes(path: Path, manifest: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
    """Compare what a checkpoint holds with ``weights`` (named "weight/…").

    Raises:
        CheckpointError: it is of another model.
    """
    prefix = "weight/"
    saved = {name.removeprefix(prefix): n for name, n in manifest["shapes"].items() if name.startswith(prefix)}
    rank_files.check_shapes(path, saved, {name.removeprefix(prefix): w.shape for name, w in weights.items()})


def read(path: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
    """The rows of every wanted piece, in new CPU tensors.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    values = {name: torch.empty(part.local.shape, dtype=part.local.dtype) for name, part in wanted.items()}
    found = dict.fromkeys(wanted, 0)
    for rank, held in enumerate(manifest["ranks"]):
        here = [
            (name, part, *held[name])
            for name, part in wanted.items()
            if name in held and held[name][0] < part.stop and part.start < held[name][1]
        ]
        if not here:
            continue
        file = path / rank_file(rank)
        try:
            with safe_open(file, "pt") as tensors:
                for name, part, start, stop in here:
                    rows = tensors.get_tensor(name)
                    low, high = max(start, part.start), min(stop, part.stop)
                    found[name] += high - low
                    if part.shape:
                        values[name][low - part.start : high - part.start] = rows[low - start : high - start]
                    else:
                        values[name].copy_(rows)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} is missing or damaged: {error}") from error
    for name, part in wanted.items():
        if found[name] != part.stop - part.start:
            raise CheckpointError(f"{path / MANIFEST} is damaged: it names {found[name]} rows of {name} for this rank")
    return values
