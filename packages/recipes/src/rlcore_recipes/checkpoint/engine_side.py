"""Save and load the parts of a checkpoint in the processes of an engine: functions for an executor's ``apply``.

In a shared folder every process writes into the checkpoint itself. For a URL each writes into its own folder, on
its machine's disk, and uploads what it finds there, which is exactly its own part; loading goes the other way.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from rlcore.engines import TrainEngine
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint.background_thread import in_background
from rlcore_kit.checkpoint.rank_files import file_record
from rlcore_recipes.checkpoint.manifest import check_contents, check_size
from rlcore_recipes.checkpoint.naming import CheckpointLocation
from rlcore_recipes.checkpoint.node_folder import base, locked, outbox

Records = dict[str, FileRecord]
_uploads: dict[tuple[CheckpointLocation, str], Future[Records]] = {}


def save_part(engine: TrainEngine, location: CheckpointLocation, role: str, background: bool) -> None:
    """Begin to save ``engine``, or save it, where `finish_part` looks for it.

    Raises:
        CheckpointError: it cannot be written here.
    """
    folder = _source(location, role)
    if location.remote:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        (engine.start_save if background else engine.save)(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error


def part_is_written(engine: TrainEngine) -> bool:
    """Return whether the engine has written its part."""
    return engine.save_done()


def finish_part(engine: TrainEngine, location: CheckpointLocation, role: str) -> Records:
    """Wait for the engine; return the files that it wrote, by path in the checkpoint. For a URL, start their upload."""
    records = engine.finish_save()
    if location.remote:
        source = _source(location, role)
        _uploads[location, role] = in_background(lambda: _upload(source, location, role, records), "upload")
    return {f"{role}/{name}": record for name, record in records.items()}


def part_is_uploaded(engine: TrainEngine, location: CheckpointLocation, role: str) -> bool:
    """Return whether this process has uploaded its part."""
    return _uploads[location, role].done()


def finish_upload(engine: TrainEngine, location: CheckpointLocation, role: str) -> Records:
    """Wait for the upload; return the uploaded files, by path in the checkpoint."""
    try:
        return _uploads.pop((location, role)).result()
    finally:
        shutil.rmtree(_source(location, role), ignore_errors=True)


def fetch_part(
    engine: TrainEngine | None, location: CheckpointLocation, role: str, files: Mapping[str, FileRecord]
) -> None:
    """Download and check the part of ``engine``; once on each machine, whatever the number of its processes.

    Raises:
        CheckpointError: it cannot be read, or is not what was written.
    """
    folder = _inbox(location, role, files)
    with locked(folder):
        if (folder / ".complete").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _download(folder, location, files)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / ".complete").touch()


def load_part(engine: TrainEngine, location: CheckpointLocation, role: str, files: Mapping[str, FileRecord]) -> None:
    """Load ``engine`` from the shared folder, or from what `fetch_part` brought here."""
    engine.load(_inbox(location, role, files) / role if location.remote else Path(location.path) / role)


@contextmanager
def local_part(location: CheckpointLocation, role: str, files: Mapping[str, FileRecord]) -> Iterator[Path]:
    """Have the folder that `TrainEngine.load` takes on this machine, for a process that has no engine.

    Raises:
        CheckpointError: see `fetch_part`.
    """
    if not location.remote:
        yield Path(location.path) / role
        return
    fetch_part(None, location, role, files)
    try:
        yield _inbox(location, role, files) / role
    finally:
        discard_part(None, location, role, files)


def discard_part(
    engine: TrainEngine | None, location: CheckpointLocation, role: str, files: Mapping[str, FileRecord]
) -> None:
    """Delete what `fetch_part` brought here; called when every process has loaded it."""
    folder = _inbox(location, role, files)
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)


def _source(location: CheckpointLocation, role: str) -> Path:
    return (outbox() / location.name if location.remote else location.unfinished) / role


def _inbox(location: CheckpointLocation, role: str, files: Mapping[str, FileRecord]) -> Path:
    """Named by what it will hold, so that nothing else is ever taken for it."""
    key = json.dumps([location.path, role, files], sort_keys=True)
    return base() / f"load-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _upload(source: Path, location: CheckpointLocation, role: str, known: Mapping[str, FileRecord]) -> Records:
    from rlcore_recipes.checkpoint.remote import file_system, reported, upload

    system, path = file_system(location.root)
    found: Records = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        target = f"{role}/{name}"
        found[target] = known.get(name) or file_record(file)
        with reported(f"cannot write {location.path}/{target}"):
            upload(system, file, f"{path}/{location.name}/{target}")
        os.unlink(file)
    return found


def _download(folder: Path, location: CheckpointLocation, files: Mapping[str, FileRecord]) -> None:
    from rlcore_recipes.checkpoint.remote import file_system, reported

    system, path = file_system(location.root)
    for name, expected in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with reported(f"cannot read {location.path}/{name}"):
            system.get_file(f"{path}/{location.name}/{name}", str(target))
        found = file_record(target)
        check_size(location.path, name, found["size"], expected)
        check_contents(location.path, name, found, expected)
