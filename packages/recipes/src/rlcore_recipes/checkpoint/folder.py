"""Checkpoints in a folder that all processes share.

Invariants: a folder ``step-N`` with a manifest is complete, because it is written under another name, flushed to disk,
and renamed last. Nothing but this module's own folders is ever moved or deleted: those with a manifest or, before and
after there is one, a file ``unfinished``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint import json_file
from rlcore_kit.checkpoint.tensor_file import flush
from rlcore_recipes.checkpoint.manifest import (
    MANIFEST,
    MARK,
    STATE,
    Manifest,
    contents,
    encode,
    read_manifest,
    record,
    records_of,
    verify,
)
from rlcore_recipes.checkpoint.naming import CheckpointLocation, is_leftover, is_name, step_of


class FolderStorage:
    """See `Storage`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return sorted((path.name for path in self._entries() if is_name(path.name)), key=step_of)

    def taken(self) -> list[str]:
        leftovers = {path.stem for path in self._entries() if is_leftover(path.name)}
        return sorted(leftovers.union(self.names()), key=step_of)

    def _entries(self) -> list[Path]:
        with _reported(f"{self.root} cannot be read"):
            return list(self.root.iterdir()) if self.root.exists() else []

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of checkpoint ``name``."""
        return read_manifest(self.root / name)

    def read(self, name: str, file: str) -> bytes:
        """Return the bytes of a file of checkpoint ``name``."""
        return json_file.read_bytes(self.root / name / file)

    def check(self, name: str) -> None:
        verify(self.root / name)

    def check_writable(self) -> None:
        existing = next(path for path in (self.root, *self.root.parents) if os.path.lexists(path))
        with _reported(f"cannot write checkpoints to {self.root}"), tempfile.TemporaryFile(dir=existing):
            pass

    def check_replaceable(self, name: str) -> None:
        final, unfinished = self.root / name, CheckpointLocation(str(self.root), name).unfinished
        for path in (final, unfinished, _replaced(final)):
            if os.path.lexists(path) and not _is_ours(path):
                raise CheckpointError(
                    f"{path} exists but is not a checkpoint (it has no {MANIFEST}), and rlcore replaces only what it "
                    "wrote; move it away or choose another folder"
                )

    def begin(self, name: str) -> None:
        self.check_replaceable(name)
        unfinished = CheckpointLocation(str(self.root), name).unfinished
        with _reported(f"cannot create {unfinished}"):
            _remove(unfinished)
            unfinished.mkdir(parents=True)
            (unfinished / MARK).touch()

    def publish(
        self, name: str, step: int, metrics: Mapping[str, float], files: Mapping[str, FileRecord], state: bytes
    ) -> None:
        final, unfinished = self.root / name, CheckpointLocation(str(self.root), name).unfinished
        old = _replaced(final)
        try:
            (unfinished / STATE).write_bytes(state)
            paths = {file: unfinished / file for file in contents(unfinished) - {MARK}}
            found = {**files, STATE: record(state)}
            # of engines that take no checksums while they write
            unknown = [file for file in paths if file not in found]
            found |= dict(zip(unknown, records_of(paths[file] for file in unknown)))
            if lost := found.keys() - paths.keys():
                raise CheckpointError(f"cannot write {final}: {min(lost)} was written but is missing")
            (unfinished / MANIFEST).write_bytes(encode(step, metrics, found))
            (unfinished / MARK).unlink(missing_ok=True)
            for path in [*unfinished.rglob("*"), unfinished]:
                flush(path)
            if final.exists():
                os.rename(final, old)
            os.rename(unfinished, final)
            flush(self.root)
        except OSError as error:
            if old.exists() and not final.exists():
                os.rename(old, final)
            raise CheckpointError(f"cannot write {final}: {error}") from error
        with suppress(OSError):  # it is cleaned up when the run is started again
            _remove(old)

    def abandon(self, name: str) -> None:
        with suppress(OSError):
            _remove(CheckpointLocation(str(self.root), name).unfinished)

    def delete(self, name: str) -> None:
        doomed = CheckpointLocation(str(self.root), name).unfinished
        with _reported(f"cannot delete the old checkpoint {self.root / name}"):
            os.rename(self.root / name, doomed)
            _remove(doomed)

    def clean_up(self) -> None:
        """Remove what interrupted writes left; put back a checkpoint that was being replaced."""
        for path in self._entries():
            if not is_leftover(path.name) or not _is_ours(path):
                continue
            final = path.with_suffix("")
            with _reported(f"cannot clean {path} up"):
                if path.suffix == ".old" and not os.path.lexists(final):
                    os.rename(path, final)
                else:
                    _remove(path)


def _replaced(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


def _is_ours(path: Path) -> bool:
    """Return whether this module wrote the folder. An empty one may be left of that; nothing is lost with it."""
    with _reported(f"{path} cannot be read"):
        if path.is_symlink() or not path.is_dir():
            return False
        names = set(os.listdir(path))
        return not names or not names.isdisjoint({MANIFEST, MARK})


def _remove(path: Path) -> None:
    """Delete a folder such that an interrupted deletion is known as ours: the mark comes first and goes last."""
    if not path.is_dir():
        return
    (path / MARK).touch()
    for entry in path.iterdir():
        if entry.name == MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (path / MARK).unlink()
    path.rmdir()


@contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error}") from error
