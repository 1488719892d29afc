"""Sharded checkpoints: one safetensors file per rank and a manifest, without any pickle.

A folder holds ``rank-NNNNN.safetensors`` (blocks of the global tensors that `rlcore_megatron.sharded_state` describes,
and the rank's random states) and ``checkpoint.json``, written last: which blocks stand where, the files' checksums, and
the shapes that identify the model. Any layout can load it: each rank reads whatever overlaps with its own blocks.

Megatron's own writer is not used: its ``.metadata`` is a pickle, which reading would execute, it differs from one save
to the next, and its background writer is a spawned process. The description of the layout is Megatron's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore.tensor_file import flush, write_tensors

MANIFEST = "checkpoint.json"
_FORMAT = 1


@dataclass(frozen=True)
class Part:
    """What one rank writes.

    Attributes:
        tensors: blocks and random states by their names in the file, in host memory.
        blocks: per block its name, key and offset in the global tensor of that key.
        random: random states as text (the rest of them is among ``tensors``).
    """

    tensors: Mapping[str, torch.Tensor]
    blocks: Sequence[tuple[str, str, tuple[int, ...]]]
    random: str


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
        raise CheckpointError(f"rank {rank}: cannot write {file}: {problem}") from problem


def complete(
    path: Path, part: Part, written: FileRecord | CheckpointError, facts: Mapping[str, Any], rank: int
) -> dict[str, FileRecord]:
    """Add the manifest once all ranks have written their parts; collective.

    Args:
        written: what became of this rank's part.
        facts: of the engine, on rank 0 those of the whole model.

    Returns:
        the files that this rank wrote.

    Raises:
        CheckpointError: a rank could not write; the folder then has no manifest.
    """
    failed = isinstance(written, CheckpointError)
    reports = gather_objects((str(written) if failed else None, None if failed else written, part.blocks))
    _raise_first(f"checkpoint {path} could not be written", (report[0] for report in reports))
    assert not isinstance(written, CheckpointError)
    records = {_file(rank): written}
    error = None
    if rank == 0:
        manifest = {
            "format": _FORMAT,
            **facts,
            "files": {_file(other): report[1] for other, report in enumerate(reports)},
            "blocks": [report[2] for report in reports],
        }
        try:
            records[MANIFEST] = _write_manifest(path, manifest)
        except OSError as problem:
            error = f"rank 0: cannot write {path / MANIFEST}: {problem.strerror or problem}"
    # nobody returns before the manifest stands
    _raise_first(f"checkpoint {path} could not be written", gather_objects(error))
    return records


def read_manifest(path: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The manifest of a checkpoint whose weights have the global ``shapes``.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another model.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} holds no complete checkpoint: {MANIFEST} is missing")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {manifest['format']}, this version reads {_FORMAT}")
        missing = {"shapes", "blocks", "files", "optimizer", "schedule_step", "adam_step"} - manifest.keys()
        if missing:
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    saved = manifest["shapes"]
    for name in sorted(saved.keys() | shapes.keys()):
        here, there = (list(known[name]) if name in known else "nothing" for known in (shapes, saved))
        if here != there:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {name} has shape {there} there and {here} here"
            )
    return manifest


def check_files(path: Path, manifest: Mapping[str, Any], rank: int, world: int) -> None:
    """Compare this rank's share of the files with their checksums: together all ranks read each of them once.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    for name, record in list(manifest["files"].items())[rank::world]:
        try:
            found = _checksum(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} is missing or damaged: {error}") from error
        if found != record["sha256"]:
            raise CheckpointError(f"{path / name} is damaged: it does not match its checksum")


class Reader:
    """Blocks of the global tensors, put together from those that were saved."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self._path = path
        self._saved: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
        for rank, blocks in enumerate(manifest["blocks"]):
            for name, key, offset in blocks:
                self._saved.setdefault(key, []).append((_file(rank), name, tuple(offset)))

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


def agree(error: Exception | None, path: Path) -> None:
    """Raise CheckpointError on every rank if one of them has an error."""
    reports = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    _raise_first(f"checkpoint {path} cannot be loaded on another rank", reports)


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


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> FileRecord:
    content = json.dumps(manifest).encode()
    temporary = path / f"{MANIFEST}.partial"
    temporary.write_bytes(content)
    flush(temporary)
    temporary.replace(path / MANIFEST)
    flush(path)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _checksum(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _raise_first(what: str, errors: Iterable[str | None]) -> None:
    for error in errors:
        if error is not None:
            raise CheckpointError(f"{what}: {error}")
