"""The manifest: what a complete checkpoint consists of, and whether that is still so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from rlcore.checkpoint.rank_files import file_record
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1


class Manifest(TypedDict):
    """``files`` by their paths in the checkpoint; of the step's ``metrics`` the one that chooses the best."""

    format: int
    step: int
    metrics: dict[str, float]
    files: dict[str, FileRecord]


def encode(step: int, metrics: Mapping[str, float], files: Mapping[str, FileRecord]) -> bytes:
    manifest = {"format": FORMAT, "step": step, "metrics": dict(metrics), "files": dict(sorted(files.items()))}
    return json.dumps(manifest, indent=1).encode()


def decode(content: bytes, location: str) -> Manifest:
    """The manifest of the checkpoint at ``location``.

    Raises:
        CheckpointError: it is damaged, or of another version's format.
    """
    try:
        manifest: Manifest = json.loads(content)
        known = manifest["format"] == FORMAT
        manifest["files"], manifest["metrics"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{location}/{MANIFEST} cannot be read: {error!r}") from error
    if not known:
        raise CheckpointError(
            f"{location} has format {manifest['format']}, this rlcore reads {FORMAT}; install its version"
        )
    return manifest


def decode_state(content: bytes, location: str) -> dict[str, Any]:
    try:
        return json.loads(content)  # type: ignore[no-any-return]
    except ValueError as error:
        raise CheckpointError(f"the state of {location} cannot be read: {error}") from error


def record(content: bytes) -> FileRecord:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def records_of(paths: Iterable[Path]) -> list[FileRecord]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(file_record, paths))


def check_size(location: str, name: str, size: int | None, expected: FileRecord) -> None:
    """Args: ``size`` in bytes of the file ``name``; None if there is none."""
    if size is None:
        raise CheckpointError(f"{location} lacks {name}")
    if size != expected["size"]:
        raise CheckpointError(f"{location}: {name} has {size} bytes instead of {expected['size']}")


def check_contents(location: str, name: str, found: FileRecord, expected: FileRecord) -> None:
    if found["sha256"] != expected["sha256"]:
        raise CheckpointError(f"{location}: the contents of {name} have changed since it was written")


def verify(path: Path) -> None:
    """Check that the folder ``path`` holds what was written.

    Raises:
        CheckpointError: names the first thing that is missing or differs.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}")
    files = read_manifest(path)["files"]
    for name, expected in files.items():
        file = path / name
        check_size(str(path), name, file.stat().st_size if file.is_file() else None, expected)
    for name, found in zip(files, records_of(path / name for name in files)):
        check_contents(str(path), name, found, files[name])


def read_manifest(path: Path) -> Manifest:
    """The manifest of a local checkpoint."""
    try:
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it is unfinished or not a checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}") from error
    return decode(content, str(path))
