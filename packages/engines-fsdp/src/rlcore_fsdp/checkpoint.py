"""Sharded checkpoints: one safetensors file per rank and a manifest, without any pickle.

A folder holds ``rank-NNNNN.safetensors`` (the rows of every weight and optimizer state that the rank owns, and its
random states) and ``checkpoint.json``, written last: which rows stand where, their checksums, and the shapes that
identify the model. Any number of ranks can load it: each reads the rows that it needs from whichever files hold them.
"""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from rlcore.errors import CheckpointError
from rlcore_fsdp.distributed import gather_objects

MANIFEST = "checkpoint.json"
_FORMAT = 1


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


def write(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], rank: int, world: int) -> None:
    """Write this rank's part of ``tensors``; rank 0 adds the manifest with ``facts`` once all are done.

    Raises:
        CheckpointError: a rank could not write; the folder then has no manifest.
    """
    error: str | None = None
    entries: dict[str, Any] = {}
    try:
        path.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (path / MANIFEST).unlink(missing_ok=True)
        held: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            part = piece(tensor, rank)
            if part.writes and part.stop > part.start:
                held[name] = part.local.detach().cpu().contiguous()
                entries[name] = {"rows": [part.start, part.stop], "crc32": _checksum(held[name])}
        states, text = _random_states()
        file = path / _file(rank)
        save_file({**held, **states}, file, metadata={"random": json.dumps(text)})
        _flush(file)
    except (OSError, SafetensorError) as problem:
        error = f"rank {rank}: {problem}"
    reports = gather_objects((error, entries), world)
    _raise_first(f"checkpoint {path} could not be written", (report[0] for report in reports))
    if rank == 0:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        manifest = {"format": _FORMAT, **facts, "shapes": shapes, "ranks": [report[1] for report in reports]}
        temporary = path / f"{MANIFEST}.partial"
        temporary.write_text(json.dumps(manifest))
        _flush(temporary)
        temporary.replace(path / MANIFEST)
        _flush(path)
    gather_objects(None, world)  # nobody returns before the manifest stands


def read_manifest(path: Path, shapes: Mapping[str, Iterable[int]]) -> dict[str, Any]:
    """The manifest of a checkpoint whose weights have ``shapes``.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another model.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} holds no complete checkpoint: {MANIFEST} is missing")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        version = manifest["format"]
        saved = {name: shape for name, shape in manifest["shapes"].items() if name.startswith("weight/")}
        missing = {"ranks", "optimizer", "schedule_step", "adam_steps"} - manifest.keys()
        if missing:
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if version != _FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {version}, this version reads {_FORMAT}")
    ours = {name: list(shape) for name, shape in shapes.items()}
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            here, there = (f"{x.get(name)}" if name in x else "nothing" for x in (ours, saved))
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {name.removeprefix('weight/')} has shape {there} there and "
                f"{here} here"
            )
    return manifest


def read(path: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
    """The rows of every wanted piece, checked, in new CPU tensors.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    values = {name: torch.empty(part.local.shape, dtype=part.local.dtype) for name, part in wanted.items()}
    found = dict.fromkeys(wanted, 0)
    for rank, entries in enumerate(manifest["ranks"]):
        here = [
            (name, part, *entries[name]["rows"])
            for name, part in wanted.items()
            if name in entries and entries[name]["rows"][0] < part.stop and part.start < entries[name]["rows"][1]
        ]
        if not here:
            continue
        file = path / _file(rank)
        try:
            with safe_open(file, "pt") as tensors:
                for name, part, start, stop in here:
                    rows = tensors.get_tensor(name)
                    if _checksum(rows) != entries[name]["crc32"]:
                        raise CheckpointError(f"{file} is damaged: {name} does not match its checksum")
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


def read_random_states(path: Path, manifest: Mapping[str, Any], rank: int) -> tuple[dict[str, torch.Tensor], Any]:
    """The random states of ``rank`` (of another one where there were fewer ranks)."""
    file = path / _file(rank % len(manifest["ranks"]))
    try:
        with safe_open(file, "pt") as tensors:
            states = {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith("random/")}  # noqa: SIM118
            return states, json.loads(tensors.metadata()["random"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def restore_random_states(states: Mapping[str, torch.Tensor], text: Mapping[str, Any]) -> None:
    """Set Python's, NumPy's, torch's and (where there is one) CUDA's generator."""
    version, internal, gauss = text["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, position, has_gauss, cached = text["numpy"]
    np.random.set_state((kind, states["random/numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["random/torch"])
    if torch.cuda.is_available() and "random/cuda" in states:
        torch.cuda.set_rng_state(states["random/cuda"])


def agree(error: Exception | None, path: Path, world: int) -> None:
    """Raise CheckpointError on every rank if one of them has an error."""
    reports = gather_objects(None if error is None else str(error), world)
    if error is not None:
        raise error
    _raise_first(f"checkpoint {path} cannot be loaded on another rank", reports)


def _random_states() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = {"random/torch": torch.get_rng_state(), "random/numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states, {"python": random.getstate(), "numpy": [kind, position, has_gauss, cached]}


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _flush(path: Path) -> None:
    """Make sure that what was written survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_first(what: str, errors: Iterable[str | None]) -> None:
    for error in errors:
        if error is not None:
            raise CheckpointError(f"{what}: {error}")
