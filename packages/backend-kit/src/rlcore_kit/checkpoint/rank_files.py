"""A folder that the ranks of an engine write together: a file of tensors each and a manifest, without any pickle.

``rank-NNNNN.safetensors`` holds the parts of whole tensors that a rank writes, and its random states.
``checkpoint.json``, written last, says which parts those are (in the engine's own terms), the files' checksums, and
what identifies the model. Each engine describes it by a `RankManifest` of its own.
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

from rlcore import json_file
from rlcore.boundary import boundary
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore.json_file import Count, FileName, JsonFile
from rlcore.regular_file import open_regular
from rlcore_kit.checkpoint import random_states
from rlcore_kit.checkpoint.random_states import RandomStates
from rlcore_kit.checkpoint.tensor_file import flush, write_tensors

MANIFEST = "checkpoint.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer states of a weight (AdamW's moments), by their names in checkpoints and in torch."""

Gather = Callable[[Any], list[Any]]
"""Gives a value of plain data that each rank calls it with to all of them, by rank."""


class RankManifest(JsonFile):
    """What ``checkpoint.json`` holds; an engine adds ``format: Literal[...]`` and whatever else it needs."""

    optimizer: bool = Field(description="Whether optimizer states are in it.")
    schedule_step: Count = Field(description="Steps of the schedule that were made.")
    shapes: dict[str, list[Count]] = Field(description="Shapes of the whole tensors by name.")
    files: dict[FileName, FileRecord] = Field(description="All files but this one.")
    ranks: Sequence[Any] = Field(min_length=1, description="Which parts of the whole each rank wrote.")


Manifest = TypeVar("Manifest", bound=RankManifest)


@dataclass(frozen=True)
class RankPart:
    """What one rank writes.

    Attributes:
        tensors: by their names in the file, on any device; live views or copies.
        places: which parts of the whole they are, as JSON.
        random: random states as text (the rest of them is among ``tensors``).
    """

    tensors: Mapping[str, torch.Tensor]
    places: Any
    random: str


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_part(path: Path, part: RankPart, rank: int) -> dict[str, FileRecord]:
    """Write ``part`` to the folder ``path`` and flush it to disk; its checksum is taken on the way. No collective.

    Raises:
        CheckpointError: names the file.
    """
    file = path / rank_file(rank)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if rank == 0:  # of an earlier checkpoint, which this one replaces
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
    """Add the manifest once all ranks have written their parts; collective.

    Args:
        written: what became of this rank's part: its files.
        manifest: makes that of the whole model out of ``files`` and ``ranks``; called on rank 0.

    Returns:
        the files that this rank wrote.

    Raises:
        CheckpointError: a rank could not write; the folder then has no manifest.
    """
    failed = isinstance(written, CheckpointError)
    reports = gather((str(written) if failed else None, None if failed else written, part.places))
    _raise_first(f"checkpoint {path} could not be written", (report[0] for report in reports))
    assert not isinstance(written, CheckpointError)
    records = dict(written)
    error = None
    if rank == 0:
        files = {name: record for report in reports for name, record in report[1].items()}
        try:
            whole = manifest(files=files, ranks=[report[2] for report in reports])
            records[MANIFEST] = _write_manifest(path, whole.encoded())
        except OSError as problem:
            error = f"rank 0: cannot write {path / MANIFEST}: {problem.strerror or problem}"
        except ValidationError as problem:  # such as a number of the optimizer's that is not finite
            error = f"rank 0: cannot write {path / MANIFEST}: {json_file.first_problem(problem)}"
    # nobody returns before the manifest stands
    _raise_first(f"checkpoint {path} could not be written", gather(error))
    return records


def read_manifest(path: Path, kind: type[Manifest], optimizer: bool = False) -> Manifest:
    """Read the manifest of the checkpoint ``path``.

    Args:
        optimizer: whether the optimizer's states are needed.

    Raises:
        CheckpointError: there is none, it is damaged, has another format than ``kind``, or no optimizer states.
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
    """Compare the shapes of whole tensors.

    Raises:
        CheckpointError: the checkpoint ``path`` is of another model.
    """
    for name in sorted(saved.keys() | ours.keys()):
        here, there = (list(known[name]) if name in known else "nothing" for known in (ours, saved))
        if here != there:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {name} has shape {there} there and {here} here"
            )


def check_files(path: Path, manifest: RankManifest, rank: int, world: int) -> None:
    """Compare this rank's share of the files with their checksums: together all ranks read each of them once.

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
    """The random states of ``rank`` (of another one where there were fewer), for `random_states.restore`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    from safetensors import safe_open  # which engines that read these files install, the core does not

    file = path / rank_file(rank % len(manifest.ranks))
    with boundary(f"{file} is missing or damaged", CheckpointError), safe_open(file, "pt") as tensors:
        names = [name for name in tensors.keys() if name.startswith("random/")]  # noqa: SIM118 (not a mapping)
        text = (tensors.metadata() or {}).get("random", "")
        return random_states.checked({name: tensors.get_tensor(name) for name in names}, text, str(file))


def file_record(file: Path) -> FileRecord:
    """What the regular file holds, by reading it.

    Raises:
        OSError: it cannot be read, or is something else.
    """
    with open_regular(file) as content:
        size = os.fstat(content.fileno()).st_size
        return {"size": size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def agree(error: Exception | None, path: Path, gather: Gather, done: str = "loaded") -> None:
    """Raise CheckpointError on every rank if one of them has an error; collective."""
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
