"""The folder that the ranks of an engine write together: one file of tensors for each rank, and a manifest.

``rank-NNNNN.safetensors`` holds the parts of full tensors that one rank writes, and its random states.
``checkpoint.json``, written last, describes these parts (in a form that the engine defines), the checksums of the
files, and what identifies the model. Each engine extends `RankManifest`; `rlcore_kit.checkpoint` explains it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import safe_open

from rlcore.boundary import boundary
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore.regular_file import open_regular
from rlcore_kit.checkpoint import json_file, random_states
from rlcore_kit.checkpoint.json_file import Count, FileName, JsonFile
from rlcore_kit.checkpoint.random_states import RandomStates
from rlcore_kit.checkpoint.tensor_file import flush, write_tensors

MANIFEST = "checkpoint.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer states of a weight (AdamW's moments), by their names in checkpoints and in torch."""

Gather = Callable[[Any], list[Any]]
"""All-gather of a JSON-like value: returns every rank's value, in rank order."""


class RankManifest(JsonFile):
    """The contents of ``checkpoint.json``; an engine adds ``format: Literal[...]`` and further fields."""

    optimizer: bool = Field(description="Whether the checkpoint holds optimizer states.")
    schedule_step: Count = Field(description="Finished steps of the learning-rate schedule.")
    shapes: dict[str, list[Count]] = Field(description="Shapes of the full tensors by name.")
    files: dict[FileName, FileRecord] = Field(description="All files except this one.")
    ranks: Sequence[Any] = Field(min_length=1, description="Parts of the full tensors that each rank wrote.")


Manifest = TypeVar("Manifest", bound=RankManifest)


@dataclass(frozen=True)
class RankPart:
    """The part of a checkpoint that one rank writes.

    Attributes:
        tensors: tensors by their names in the file, on any device; live views or copies.
        description: which parts of the full tensors they are, as JSON; becomes the rank's entry in
            `RankManifest.ranks`.
        random: random states as text; the others are among ``tensors``.
    """

    tensors: Mapping[str, torch.Tensor]
    description: Any
    random: str


def rank_file(rank: int) -> str:
    """Return the name of the file of ``rank``."""
    return f"rank-{rank:05d}.safetensors"


def write_part(path: Path, part: RankPart, rank: int) -> dict[str, FileRecord]:
    """Write ``part`` to the folder ``path``, flush it to disk, and return the file's record. Not collective.

    Raises:
        CheckpointError: the file could not be written; the message names it.
    """
    file = path / rank_file(rank)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if rank == 0:  # this checkpoint replaces an earlier one
            (path / MANIFEST).unlink(missing_ok=True)
        return {file.name: write_tensors(file, part.tensors, {"random": part.random})}
    except OSError as problem:
        raise CheckpointError(f"rank {rank}: cannot write {file}: {problem.strerror or problem}") from problem


def complete(
    path: Path,
    part: RankPart,
    written: Mapping[str, FileRecord] | CheckpointError,
    manifest: Callable[..., RankManifest],
    rank: int,
    gather: Gather,
) -> dict[str, FileRecord]:
    """Write the manifest after all ranks have written their parts; collective.

    Args:
        written: files that this rank wrote, or its error.
        manifest: makes the manifest from the keyword arguments ``files`` and ``ranks``; called on rank 0.

    Returns:
        the files that this rank wrote.

    Raises:
        CheckpointError: a rank could not write; the folder then has no manifest.
    """
    failed = isinstance(written, CheckpointError)
    reports = gather((str(written) if failed else None, None if failed else written, part.description))
    _raise_first(f"checkpoint {path} could not be written", (report[0] for report in reports))
    assert not isinstance(written, CheckpointError)
    records = dict(written)
    error = None
    if rank == 0:
        files = {name: record for report in reports for name, record in report[1].items()}
        try:
            content = manifest(files=files, ranks=[report[2] for report in reports])
            records[MANIFEST] = _write_manifest(path, content.encoded())
        except OSError as problem:
            error = f"rank 0: cannot write {path / MANIFEST}: {problem.strerror or problem}"
        except ValidationError as problem:  # such as an optimizer state that is not finite
            error = f"rank 0: cannot write {path / MANIFEST}: {json_file.first_problem(problem)}"
    # every rank waits until the manifest is written
    _raise_first(f"checkpoint {path} could not be written", gather(error))
    return records


def read_manifest(path: Path, kind: type[Manifest], optimizer: bool = False) -> Manifest:
    """Read the manifest of the checkpoint ``path``.

    Args:
        optimizer: require optimizer states.

    Raises:
        CheckpointError: the manifest is missing, damaged or of another format than ``kind``, or the checkpoint has no
            optimizer states.
    """
    if not os.path.exists(path / MANIFEST):
        raise CheckpointError(f"{path} holds no complete checkpoint: {MANIFEST} is missing")
    manifest = json_file.read(path / MANIFEST, kind)
    lacking = {rank_file(rank) for rank in range(len(manifest.ranks))} - manifest.files.keys()
    if lacking:
        raise CheckpointError(
            f"{path / MANIFEST} is damaged: it has parts of {len(manifest.ranks)} ranks, but no file {min(lacking)}"
        )
    if optimizer and not manifest.optimizer:
        raise CheckpointError(f"{path} was saved by a frozen engine: it has no optimizer states to continue with")
    return manifest


def check_shapes(path: Path, saved: Mapping[str, Iterable[int]], ours: Mapping[str, Iterable[int]]) -> None:
    """Compare the shapes of the full tensors in the checkpoint with those of the model.

    Raises:
        CheckpointError: a shape differs: the checkpoint ``path`` is of another model.
    """
    for name in sorted(saved.keys() | ours.keys()):
        here, there = (list(known[name]) if name in known else "nothing" for known in (ours, saved))
        if here != there:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {name} has shape {there} in the checkpoint and "
                f"{here} in the model"
            )


def check_files(path: Path, manifest: RankManifest, rank: int, world: int) -> None:
    """Compare this rank's share of the files with their checksums; all ranks together read each file once.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    for name, record in list(manifest.files.items())[rank::world]:
        try:
            found = file_record(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name} is missing or damaged: {error}") from error
        if found["sha256"] != record["sha256"]:
            raise CheckpointError(f"{path / name} is damaged: it does not match its checksum")


def read_random_states(path: Path, manifest: RankManifest, rank: int) -> RandomStates:
    """Read the random states of ``rank`` (of another rank if the checkpoint has fewer), for `random_states.restore`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    file = path / rank_file(rank % len(manifest.ranks))
    with boundary(f"{file} is missing or damaged", CheckpointError), safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if name.startswith("random/")]  # noqa: SIM118 (not a mapping)
        text = (tensors.metadata() or {}).get("random", "")
        return random_states.checked({name: tensors.get_tensor(name) for name in names}, text, str(file))


def file_record(file: Path) -> FileRecord:
    """Return size and checksum of a regular file.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    with open_regular(file) as content:
        size = os.fstat(content.fileno()).st_size
        return {"size": size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def agree(error: Exception | None, path: Path, gather: Gather, done: str = "loaded") -> None:
    """Raise `CheckpointError` on every rank if one rank has an error; collective."""
    reports = gather(None if error is None else str(error))
    if error is not None:
        raise error
    _raise_first(f"checkpoint {path} cannot be {done} on another rank", reports)


def _write_manifest(path: Path, content: bytes) -> FileRecord:
    temporary = path / f"{MANIFEST}.partial"
    temporary.write_bytes(content)
    flush(temporary)
    temporary.replace(path / MANIFEST)
    flush(path)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _raise_first(what: str, errors: Iterable[str | None]) -> None:
    for error in errors:
        if error is not None:
            raise CheckpointError(f"{what}: {error}")
