"""Checkpoints at a URL that fsspec reaches, such as an object store.

Such stores cannot rename, so the manifest, written last, makes a checkpoint complete. A file ``unfinished``, written
first, marks what this module may delete where there is no manifest: nothing else is ever deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint.json_file import LIMIT
from rlcore_recipes.checkpoint.manifest import (
    MANIFEST,
    MARK,
    STATE,
    Manifest,
    check_complete,
    check_size,
    decode,
    encode,
    record,
)
from rlcore_recipes.checkpoint.naming import is_name, step_of
from rlcore_recipes.data.url_packages import package_of


def file_system(root: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the URL's path in it.

    Raises:
        CheckpointError: there is none, or its package is not installed.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(root)
    except ImportError as error:
        package = package_of(root)
        raise CheckpointError(f"{root} {package.advice if package else error}") from error
    except ValueError as error:
        raise CheckpointError(f"{root} is not a URL that fsspec supports: {error}") from error
    return system, path.rstrip("/")


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn any error in the block into a CheckpointError: each client of an object store has its own exceptions."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


def upload(system: Any, source: Path, target: str) -> None:
    """Copy a local file, into a folder that need not exist."""
    in_folder(system, target, lambda: system.put_file(str(source), target))


def in_folder(system: Any, target: str, write: Callable[[], object]) -> None:
    """Let ``write`` write the file ``target``; make its folder where folders are not implied, but never a bucket."""
    try:
        write()
    except FileNotFoundError:
        bucket = target.partition("/")[0]
        if bucket and not system.exists(bucket):
            raise
        system.makedirs(target.rpartition("/")[0], exist_ok=True)
        write()


class RemoteStorage:
    """See `Storage`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._system, self._path = file_system(root)

    def names(self) -> list[str]:
        with reported(f"cannot list {self.root}"):
            self._system.invalidate_cache()
            try:
                entries = self._system.ls(self._path, detail=False)
            except FileNotFoundError:
                return []
            names = {entry.rstrip("/").rpartition("/")[2] for entry in entries}
            return sorted((name for name in names if is_name(name)), key=step_of)

    def taken(self) -> list[str]:
        return self.names()

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of checkpoint ``name``."""
        location = f"{self.root}/{name}"
        with reported(f"cannot read {location}/{MANIFEST}"):
            try:
                content = self._content(name, MANIFEST)
            except FileNotFoundError:
                raise CheckpointError(f"{location} has no {MANIFEST}: it is unfinished or not a checkpoint") from None
        return decode(content, location)

    def read(self, name: str, file: str) -> bytes:
        """Return the bytes of a file of checkpoint ``name``."""
        with reported(f"cannot read {self.root}/{name}/{file}"):
            return self._content(name, file)

    def _content(self, name: str, file: str) -> bytes:
        path = self._inside(name, file)
        if (size := self._system.info(path)["size"]) > LIMIT:
            raise CheckpointError(f"{self.root}/{name}/{file} has {size} bytes, more than such a file can have")
        return self._system.cat_file(path)  # type: ignore[no-any-return]

    def check(self, name: str) -> None:
        """Compare sizes; contents are checked where they are downloaded."""
        expected = self.manifest(name).files
        sizes = {file: info["size"] for file, info in self._files(name).items()}
        for file in expected:
            check_size(f"{self.root}/{name}", file, sizes.get(file), expected[file])
        check_complete(f"{self.root}/{name}", sizes.keys() - {MANIFEST, MARK}, expected)

    def check_writable(self) -> None:
        probe = f"{self._path}/.rlcore-write-test"
        with reported(f"cannot write checkpoints to {self.root}"):
            self._pipe(probe, b"")
        with suppress(Exception):  # a place where nothing may be deleted will do
            self._system.rm_file(probe)

    def check_replaceable(self, name: str) -> None:
        files = self._files(name)
        if files and not {MANIFEST, MARK} & files.keys():
            raise CheckpointError(
                f"{self.root}/{name} exists but is not a checkpoint (it has no {MANIFEST}), and rlcore replaces only "
                "what it wrote; move it away or choose another URL"
            )

    def begin(self, name: str) -> None:
        self.check_replaceable(name)
        if self._files(name):
            self.delete(name)
        self._write(name, MARK, b"")

    def publish(
        self, name: str, step: int, metrics: Mapping[str, float], files: Mapping[str, FileRecord], state: bytes
    ) -> None:
        self._write(name, STATE, state)
        self._write(name, MANIFEST, encode(step, metrics, {**files, STATE: record(state)}))
        with suppress(Exception):  # where there is a manifest, it means nothing
            self._system.rm_file(self._inside(name, MARK))

    def abandon(self, name: str) -> None:
        """Leave the mark for the next `clean_up`: a process that failed late may still be uploading."""
        with suppress(CheckpointError):
            if MANIFEST not in self._files(name):
                self._empty(name)

    def delete(self, name: str) -> None:
        """Delete the checkpoint; the mark is written first and deleted last, so that an interruption is noticed."""
        self._empty(name)
        with reported(f"cannot delete {self.root}/{name}"):
            self._system.rm_file(self._inside(name, MARK))
            with suppress(FileNotFoundError):  # stores with real folders keep empty ones
                self._system.rm(self._inside(name, ""), recursive=True)

    def _empty(self, name: str) -> None:
        """Delete all but the mark, the manifest first."""
        self._write(name, MARK, b"")
        with reported(f"cannot delete {self.root}/{name}"):
            for file in sorted(self._files(name).keys() - {MARK}, key=lambda file: file != MANIFEST):
                self._system.rm_file(self._inside(name, file))

    def clean_up(self) -> None:
        for name in self.names():
            files = self._files(name)
            if MARK in files and MANIFEST not in files:
                self.delete(name)

    def _files(self, name: str) -> dict[str, dict[str, Any]]:
        """Return what is stored under the checkpoint's name, by relative path."""
        folder = self._inside(name, "")
        with reported(f"cannot list {self.root}/{name}"):
            self._system.invalidate_cache()
            found = self._system.find(folder, detail=True)
        return {path[len(folder) :].lstrip("/"): info for path, info in found.items()}

    def _write(self, name: str, file: str, content: bytes) -> None:
        target = self._inside(name, file)
        with reported(f"cannot write {self.root}/{name}/{file}"):
            self._pipe(target, content)

    def _pipe(self, target: str, content: bytes) -> None:
        in_folder(self._system, target, lambda: self._system.pipe_file(target, content))

    def _inside(self, name: str, file: str) -> str:
        return f"{self._path}/{name}/{file}".rstrip("/")
