"""Standard output and error that may go away while a run goes on (``… | head``, a terminal that was closed)."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""Error numbers of writing to a closed pipe, or to a terminal that hung up."""


@contextmanager
def output_may_end() -> Iterator[None]:
    """Drop what cannot be written to standard output and error while the block runs, instead of raising OSError.

    Metrics still reach the run's files. Without this, the first line after the reader went away ends the run, and with
    rich it does so by a SystemExit without any message.
    """
    before = sys.stdout, sys.stderr
    sys.stderr = _Lossy(before[1])
    sys.stdout = _Lossy(before[0])
    try:
        yield
    finally:
        sys.stdout.flush()  # here, not when the interpreter ends, which would make it exit with 120
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Lossy:
    """A text stream whose `write` and `flush` never raise OSError; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if error.errno not in GONE:  # such as a full disk, which may get room again
            return
        # What the stream still holds in its buffer, and what others write to the descriptor, goes nowhere from now on.
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self is sys.stdout:
            print("standard output was closed; the run goes on without it", file=sys.stderr)
