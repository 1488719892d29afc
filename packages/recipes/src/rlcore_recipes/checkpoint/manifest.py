"""The manifest and the state of a checkpoint: what they hold, and whether a folder is still what the manifest says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from rlcore.boundary import boundary
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint import json_file
from rlcore_kit.checkpoint.json_file import Count, FileName, Finite, JsonFile
from rlcore_kit.checkpoint.rank_files import file_record
from rlcore_recipes.checkpoint.naming import is_name, step_of

MANIFEST = "manifest.json"
STATE = "state.json"
MARK = "unfinished"  # says, where there is no manifest, that rlcore began what lies there


def _with_state(files: dict[str, FileRecord]) -> dict[str, FileRecord]:
    if STATE not in files or MANIFEST in files:
        raise ValueError(f"lists {'no ' + STATE if STATE not in files else 'itself'}")
    return files


class Manifest(JsonFile):
    """``manifest.json``, which is written last and makes a checkpoint complete."""

    format: Literal[1] = 1
    step: Count = Field(description="Steps done.")
    metrics: dict[str, Finite] = Field(description="Of the step's metrics the one that chooses the best.")
    files: Annotated[dict[FileName, FileRecord], AfterValidator(_with_state)] = Field(
        description="All other files by their paths in the checkpoint."
    )


class RunState(JsonFile):
    """``state.json``: the plain values of a run."""

    recipe: str = Field(description="The recipe's name.")
    step: Count = Field(description="Steps done.")
    run_id: str = Field(max_length=200, description="By which trackers continue the run.")
    parts: dict[str, dict[str, Any]] = Field(description="State of data, controllers and the like, by name.")


def encode(step: int, metrics: Mapping[str, float], files: Mapping[str, FileRecord]) -> bytes:
    """Return the manifest as it is written.

    Raises:
        CheckpointError: an engine names a file outside its folder, or the like.
    """
    try:
        return Manifest(step=step, metrics=dict(metrics), files=dict(sorted(files.items()))).encoded(indent=1)
    except ValidationError as error:
        raise CheckpointError(f"cannot write {MANIFEST}: {json_file.first_problem(error)}") from error


def decode(content: bytes, location: str) -> Manifest:
    """Return the manifest of the checkpoint at ``location``.

    Raises:
        CheckpointError: it is damaged, of another version's format, or of another step than the name says.
    """
    manifest = json_file.parse(content, Manifest, f"{location}/{MANIFEST}")
    name = location.rpartition("/")[2]
    if is_name(name) and step_of(name) != manifest.step:
        raise CheckpointError(f"{location}/{MANIFEST} is damaged: it is of step {manifest.step}")
    return manifest


def decode_state(content: bytes, manifest: Manifest, parts: Mapping[str, type[JsonFile]], location: str) -> RunState:
    """Return the state of the checkpoint at ``location``.

    Args:
        parts: what describes the entries of ``parts``, by name; others are not looked into.

    Raises:
        CheckpointError: it is damaged, or of another step than the manifest.
    """
    where = f"{location}/{STATE}"
    state = json_file.parse(content, RunState, where)
    if state.step != manifest.step:
        raise CheckpointError(f"{where} is damaged: it is of step {state.step}, the manifest of {manifest.step}")
    for name in parts.keys() & state.parts.keys():
        json_file.parse(json.dumps(state.parts[name]), parts[name], f"{where}, parts.{name}")
    return state


def record(content: bytes) -> FileRecord:
    """Return what the manifest holds of a file: size and checksum."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def records_of(paths: Iterable[Path]) -> list[FileRecord]:
    """Return the record of each file, computed in threads."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(file_record, paths))


def check_size(location: str, name: str, size: int | None, expected: FileRecord) -> None:
    """Check ``size``, in bytes, of the file ``name``; None if there is no such file."""
    if size is None:
        raise CheckpointError(f"{location} lacks {name}")
    if size != expected["size"]:
        raise CheckpointError(f"{location}: {name} has {size} bytes instead of {expected['size']}")


def check_contents(location: str, name: str, found: FileRecord, expected: FileRecord) -> None:
    """Compare the checksum of the file ``name`` with that in the manifest."""
    if found["sha256"] != expected["sha256"]:
        raise CheckpointError(f"{location}: the contents of {name} have changed since it was written")


def check_complete(location: str, found: Collection[str], listed: Collection[str]) -> None:
    """Compare the names of the files ``found`` in a checkpoint, but for the manifest, with those in it.

    Raises:
        CheckpointError: the manifest lists fewer.
    """
    if unknown := set(found) - set(listed):
        raise CheckpointError(f"{location} holds {min(unknown)}, which its {MANIFEST} does not list")


def verify(path: Path) -> None:
    """Check that the folder ``path`` holds what was written, and nothing else.

    Raises:
        CheckpointError: names the first thing that is missing or differs.
    """
    with boundary(f"the checkpoint {path} cannot be read", CheckpointError):
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint {path}")
        files = read_manifest(path).files
        for name, expected in files.items():
            file = path / name
            check_size(str(path), name, file.stat().st_size if file.is_file() else None, expected)
        check_complete(str(path), contents(path) - {MANIFEST}, files)
        for name, found in zip(files, records_of(path / name for name in files)):
            check_contents(str(path), name, found, files[name])


def contents(path: Path) -> set[str]:
    """Return what is below the folder ``path`` and not itself a folder, by relative path."""
    files = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    return {file.relative_to(path).as_posix() for file in files}


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a local checkpoint."""
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise CheckpointError(f"{path} has no {MANIFEST}: it is unfinished or not a checkpoint")
    return decode(json_file.read_bytes(file), str(path))
