"""Checkpoints in a folder that all processes share.

Invariants: a folder ``step-N`` with a manifest is complete, because it is written under another name, flushed to disk,
and renamed last; and nothing but this module's own folders is ever moved or deleted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from rlcore.checkpoint.tensor_file import flush
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_recipes.checkpoint.manifest import (
    MANIFEST,
    STATE,
    Manifest,
    encode,
    read_manifest,
    record,
    records_of,
    verify,
)
from rlcore_recipes.checkpoint.naming import Place, is_leftover, is_name, step_of


class FolderStorage:
    """See `Storage`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted((path.name for path in self.root.iterdir() if is_name(path.name)), key=step_of)

    def manifest(self, name: str) -> Manifest:
        return read_manifest(self.root / name)

    def read(self, name: str, file: str) -> bytes:
        try:
            return (self.root / name / file).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.root / name / file} cannot be read: {error}") from error

    def check(self, name: str) -> None:
        verify(self.root / name)

    def begin(self, name: str) -> None:
        final, unfinished = self.root / name, Place(str(self.root), name).unfinished
        if final.exists() and not (final / MANIFEST).is_file():
            raise CheckpointError(
                f"{final} exists but is not a checkpoint (it has no {MANIFEST}); move it away or choose another folder"
            )
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {unfinished}: {error}") from error

    def publish(
        self, name: str, step: int, metrics: Mapping[str, float], files: Mapping[str, FileRecord], state: bytes
    ) -> None:
        final, unfinished = self.root / name, Place(str(self.root), name).unfinished
        old = final.with_name(f"{name}.old")
        try:
            (unfinished / STATE).write_bytes(state)
            paths = {path.relative_to(unfinished).as_posix(): path for path in unfinished.rglob("*") if path.is_file()}
            found = {**files, STATE: record(state)}
            # of engines that take no checksums while they write
            unknown = [file for file in paths if file not in found]
            found |= dict(zip(unknown, records_of(paths[file] for file in unknown)))
            if lost := found.keys() - paths.keys():
                raise CheckpointError(f"cannot write {final}: {min(lost)} was written but is not there")
            (unfinished / MANIFEST).write_bytes(encode(step, metrics, found))
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
        shutil.rmtree(old, ignore_errors=True)

    def abandon(self, name: str) -> None:
        shutil.rmtree(Place(str(self.root), name).unfinished, ignore_errors=True)

    def delete(self, name: str) -> None:
        doomed = Place(str(self.root), name).unfinished
        try:
            os.rename(self.root / name, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            raise CheckpointError(f"cannot delete the old checkpoint {self.root / name}: {error}") from error

    def clean_up(self) -> None:
        """Also puts back a checkpoint that was being replaced."""
        for path in list(self.root.iterdir()) if self.root.is_dir() else []:
            if not is_leftover(path.name):
                continue
            final = path.with_suffix("")
            if path.suffix == ".old" and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path, ignore_errors=True)
