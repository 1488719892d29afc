"""What happens to a checkpoint in the processes of an engine: functions for an executor's ``apply``.

In a shared folder every process writes into the checkpoint itself. For a URL each writes into a folder of its own, on
its machine's disk, and uploads what it finds there, which is exactly its own part; loading goes the other way.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from rlcore.engines import TrainEngine
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint.background_thread import in_background
from rlcore_kit.checkpoint.rank_files import file_record
from rlcore_recipes.checkpoint.manifest import check_contents, check_size
from rlcore_recipes.checkpoint.naming import Place
from rlcore_recipes.checkpoint.node_folder import base, locked, outbox

Records = dict[str, FileRecord]
_uploads: dict[tuple[Place, str], Future[Records]] = {}


def save_part(engine: TrainEngine, place: Place, role: str, background: bool) -> None:
    """Begin to save ``engine``, or save it, where `finish_part` looks for it.

    Raises:
        CheckpointError: it cannot be written here.
    """
    folder = _source(place, role)
    if place.remote:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        (engine.start_save if background else engine.save)(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error


def part_is_written(engine: TrainEngine) -> bool:
    return engine.save_done()


def finish_part(engine: TrainEngine, place: Place, role: str) -> Records:
    """Wait for the engine; the files it wrote here, by their paths in the checkpoint. For a URL their upload begins."""
    records = engine.finish_save()
    if place.remote:
        source = _source(place, role)
        _uploads[place, role] = in_background(lambda: _upload(source, place, role, records), "upload")
    return {f"{role}/{name}": record for name, record in records.items()}


def part_is_uploaded(engine: TrainEngine, place: Place, role: str) -> bool:
    return _uploads[place, role].done()


def finish_upload(engine: TrainEngine, place: Place, role: str) -> Records:
    """Wait for the upload; the files that it put there, by their paths in the checkpoint."""
    try:
        return _uploads.pop((place, role)).result()
    finally:
        shutil.rmtree(_source(place, role), ignore_errors=True)


def fetch_part(engine: TrainEngine, place: Place, role: str, files: Mapping[str, FileRecord]) -> None:
    """Download and check the part of ``engine``; once on each machine, whatever the number of its processes.

    Raises:
        CheckpointError: it cannot be read, or is not what was written.
    """
    folder = _inbox(place, role, files)
    with locked(folder):
        if (folder / ".whole").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _download(folder, place, files)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / ".whole").touch()


def load_part(engine: TrainEngine, place: Place, role: str, files: Mapping[str, FileRecord]) -> None:
    """Load ``engine`` from the shared folder, or from what `fetch_part` brought here."""
    engine.load(_inbox(place, role, files) / role if place.remote else Path(place.location) / role)


def discard_part(engine: TrainEngine, place: Place, role: str, files: Mapping[str, FileRecord]) -> None:
    """Delete what `fetch_part` brought here; called when every process has loaded it."""
    folder = _inbox(place, role, files)
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)


def _source(place: Place, role: str) -> Path:
    return (outbox() / place.name if place.remote else place.unfinished) / role


def _inbox(place: Place, role: str, files: Mapping[str, FileRecord]) -> Path:
    """Named by what it will hold, so that nothing else is ever taken for it."""
    key = json.dumps([place.location, role, files], sort_keys=True)
    return base() / f"load-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _upload(source: Path, place: Place, role: str, known: Mapping[str, FileRecord]) -> Records:
    from rlcore_recipes.checkpoint.remote import file_system, reported, upload

    system, path = file_system(place.root)
    found: Records = {}
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        target = f"{role}/{name}"
        found[target] = known.get(name) or file_record(file)
        with reported(f"cannot write {place.location}/{target}"):
            upload(system, file, f"{path}/{place.name}/{target}")
        os.unlink(file)
    return found


def _download(folder: Path, place: Place, files: Mapping[str, FileRecord]) -> None:
    from rlcore_recipes.checkpoint.remote import file_system, reported

    system, path = file_system(place.root)
    for name, expected in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with reported(f"cannot read {place.location}/{name}"):
            system.get_file(f"{path}/{place.name}/{name}", str(target))
        found = file_record(target)
        check_size(place.location, name, found["size"], expected)
        check_contents(place.location, name, found, expected)
