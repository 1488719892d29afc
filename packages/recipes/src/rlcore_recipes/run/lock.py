"""One run at a time in an output folder.

The lock is the operating system's, on a file in the folder, so that it ends with the process, however that ends. The
file's contents name the process, for the message to the user who starts a second one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from warnings import warn

from rlcore.boundary import reason
from rlcore.errors import ConfigError, RlcoreWarning

LOCK = "run.lock"
_SHOWN = 200  # bytes of a lock file that are read
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run's output folder; make the folder, and remove it if it is still empty at the end.

    Under torchrun the process of rank 0 does so for all; the value says whether this is that process.

    Raises:
        ConfigError: another process holds the lock, or the folder cannot be created or written to.
    """
    if os.environ.get("RANK", "0") != "0":
        yield False
        return
    made = _made(folder)
    try:
        descriptor = _locked(folder)
        try:
            yield True
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink()  # before the lock ends: never that of the next run
            os.close(descriptor)
    finally:
        with suppress(OSError):  # something was written to it
            for path in made:
                path.rmdir()


def _made(folder: Path) -> list[Path]:
    """Make the folder; which ones were made for that, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if os.path.exists(folder):
            raise ConfigError(f"trainer.out_dir={folder} is a file; name a folder") from error
        raise ConfigError(f"trainer.out_dir={folder} cannot be created: {reason(error)}") from error
    return missing


def _locked(folder: Path) -> int:
    """Take the lock; the open file that holds it."""
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise ConfigError(f"trainer.out_dir={folder} cannot be written to: {reason(error)}") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path} is not a regular file; move it away")
            _lock(descriptor, folder)
            if _is_at(descriptor, path):  # not the file of a run that has just ended and removed it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _own().encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(_taken(folder, _holder(descriptor))) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise ConfigError(f"trainer.out_dir={folder} cannot be locked: {reason(error)}") from error
        holder = _holder(descriptor)
        if _lives_here(holder):
            raise ConfigError(_taken(folder, holder)) from None
        before = f"; {holder} did not end in order, if it ended" if holder else ""
        warn(
            f"the file system of trainer.out_dir={folder} has no locks: only a run on this machine is noticed{before}",
            RlcoreWarning,
            stacklevel=2,
        )


def _taken(folder: Path, holder: str) -> str:
    return (
        f"trainer.out_dir={folder} is in use by another run ({holder or 'a process that has just started'}); wait "
        "until it ends, or name another folder"
    )


def _own() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()}, since {since}"


def _holder(descriptor: int) -> str:
    """Return what the lock file says of its process."""
    text = os.pread(descriptor, _SHOWN, 0).decode("utf-8", "replace").partition("\n")[0]
    return text if text.isprintable() else ""


def _lives_here(holder: str) -> bool:
    """Return whether the process that a lock file names runs on this machine."""
    words = holder.replace(",", " ").split()
    if words[:1] != ["process"] or words[2:4] != ["on", socket.gethostname()] or not words[1].isdecimal():
        return False
    return int(words[1]) != os.getpid() and Path("/proc", words[1]).exists()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
