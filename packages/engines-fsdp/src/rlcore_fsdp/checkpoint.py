"""Sharded checkpoints: one safetensors file per rank and a manifest, without any pickle.

A folder holds ``rank-NNNNN.safetensors`` (the rows of every weight and optimizer state that the rank owns, and its
random states) and ``checkpoint.json``, written last: which rows stand where, the files' checksums, and the shapes that
identify the model. Any number of ranks can load it: each reads the rows that it needs from whichever files hold them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore.tensor_file import flush, write_tensors
from rlcore_fsdp.distributed import gather_objects

MANIFEST = "checkpoint.json"
_FORMAT = 2


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


@dataclass(frozen=True)
class Part:
    """What one rank writes.

    Attributes:
        tensors: rows that this rank owns, by name, on any device; live views or copies.
        rows: ``[start, stop)`` of each of them in the whole tensor.
        random: random states as text (the rest of them is among ``tensors``).
    """

    tensors: Mapping[str, torch.Tensor]
    rows: Mapping[str, tuple[int, int]]
    random: str


def part(tensors: Mapping[str, torch.Tensor], rank: int) -> Part:
    """This rank's part of ``tensors`` (live views), with its present random states."""
    held: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        own = piece(tensor, rank)
        if own.writes and own.stop > own.start:
            held[name] = own.local.detach()
            rows[name] = (own.start, own.stop)
    states, text = _random_states()
    return Part({**held, **states}, rows, json.dumps(text))


def write_part(path: Path, part: Part, rank: int) -> FileRecord:
    """Write ``part`` to the folder ``path`` and flush it to disk; its checksum is taken on the way. No collective.

    Raises:
        CheckpointError: names the file.
    """
    file = path / _file(rank)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if rank == 0:  # of an earlier checkpoint, which this one replaces
            (path / MANIFEST).unlink(missing_ok=True)
        return write_tensors(file, part.tensors, {"random": part.random})
    except OSError as problem:
        raise CheckpointError(f"rank {rank}: cannot write {file}: {problem.strerror or problem}") from problem


def complete(
    path: Path, part: Part, written: FileRecord | CheckpointError, facts: Mapping[str, Any], rank: int, world: int
) -> dict[str, FileRecord]:
    """Add the manifest once all ranks have written their parts; collective.

    Args:
        written: what became of this rank's part.
        facts: of the engine, the same on all ranks; "shapes" of all tensors among them.

    Returns:
        the files that this rank wrote.

    Raises:
        CheckpointError: a rank could not write; the folder then has no manifest.
    """
    failed = isinstance(written, CheckpointError)
    reports = gather_objects((str(written) if failed else None, None if failed else written, part.rows), world)
    _raise_first(f"checkpoint {path} could not be written", (report[0] for report in reports))
    assert not isinstance(written, CheckpointError)
    records = {_file(rank): written}
    error = None
    if rank == 0:
        manifest = {
            "format": _FORMAT,
            **facts,
            "files": {_file(other): report[1] for other, report in enumerate(reports)},
            "ranks": [report[2] for report in reports],
        }
        try:
            records[MANIFEST] = _write_manifest(path, manifest)
        except OSError as problem:
            error = f"rank 0: cannot write {path / MANIFEST}: {problem.strerror or problem}"
    # nobody returns before the manifest stands
    _raise_first(f"checkpoint {path} could not be written", gather_objects(error, world))
    return records


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
        if version != _FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {version}, this version reads {_FORMAT}")
        saved = {name: shape for name, shape in manifest["shapes"].items() if name.startswith("weight/")}
        missing = {"ranks", "files", "optimizer", "schedule_step", "adam_steps"} - manifest.keys()
        if missing:
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    ours = {name: list(shape) for name, shape in shapes.items()}
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            here, there = (f"{x.get(name)}" if name in x else "nothing" for x in (ours, saved))
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {name.removeprefix('weight/')} has shape {there} there and "
                f"{here} here"
            )
    return manifest


def check_files(path: Path, manifest: Mapping[str, Any], rank: int, world: int) -> None:
    """Compare this rank's share of the files with their checksums: together all ranks read each of them once.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    for name, record in list(manifest["files"].items())[rank::world]:
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path / name} is missing or damaged: {error}") from error
        if found != record["sha256"]:
            raise CheckpointError(f"{path / name} is damaged: it does not match its checksum")


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
        file = path / _file(rank)
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


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> FileRecord:
    content = json.dumps(manifest).encode()
    temporary = path / f"{MANIFEST}.partial"
    temporary.write_bytes(content)
    flush(temporary)
    temporary.replace(path / MANIFEST)
    flush(path)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _raise_first(what: str, errors: Iterable[str | None]) -> None:
    for error in errors:
        if error is not None:
            raise CheckpointError(f"{what}: {error}")
