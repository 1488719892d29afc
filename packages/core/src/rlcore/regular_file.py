"""Opening and reading files that may be anything: a pipe that never ends, a device, or many gigabytes."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

MEBIBYTE = 1 << 20


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file, or one that a symbolic link names, for reading.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    # with O_NONBLOCK a pipe without a writer opens immediately, and is then refused
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        what = "is a folder" if stat.S_ISDIR(kind) else "is not a regular file (a pipe, socket or device)"
        raise OSError(errno.EINVAL, what, str(file))
    return open(descriptor, "rb")


def read_regular(file: Path, limit: int) -> bytes:
    """Return the contents of a regular file.

    Args:
        limit: the most bytes that it may have.

    Raises:
        OSError: it cannot be read, is something else than a regular file, or is larger than ``limit``.
    """
    with open_regular(file) as content:
        found = content.read(limit + 1)
    if len(found) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit // MEBIBYTE} MiB", str(file))
    return found
