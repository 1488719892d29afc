"""Folders on this machine's own disk, for checkpoints on their way to and from a URL.

They are below the folder for temporary files (``TMPDIR``). A lock tells whether a folder's owner is alive: the system
drops it with the process, so that what a killed process left is known, and deleted by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlcore.errors import CheckpointError

_held: dict[int, Path] = {}  # by process id: a forked child has not its parent's folder


def base() -> Path:
    """Return the user's folder for uploads.

    Raises:
        CheckpointError: it belongs to another user, or cannot be created.
    """
    folder = Path(tempfile.gettempdir()) / f"rlcore-checkpoints-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = folder.stat(follow_symlinks=False).st_uid
    except OSError as error:
        raise CheckpointError(f"cannot create {folder}: {error}; set TMPDIR to another folder") from error
    if owner != os.getuid():
        raise CheckpointError(f"{folder} belongs to another user; remove it, or set TMPDIR to another folder")
    return folder


def outbox() -> Path:
    """Return the folder of this process for what it uploads; only its own files are there."""
    if os.getpid() not in _held:
        with locked(base() / "outbox"):  # so that no process takes a folder that is being made for a leftover
            _delete_left_over()
            folder = Path(tempfile.mkdtemp(prefix="save-", dir=base()))
            # held open, and with it the lock, until the process ends
            descriptor = os.open(folder.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _held[os.getpid()] = folder
    return _held[os.getpid()]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time into the block."""
    descriptor = os.open(folder.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _delete_left_over() -> None:
    for lock in base().glob("save-*.lock"):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its process lives
            continue
        else:
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
