"""The boundary to libraries that read what a user gives: model folders, data files, templates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlcore.errors import DataError, RlcoreError, WorkerError

LONGEST_REASON = 400


@contextmanager
def boundary(what: str, kind: type[RlcoreError] = DataError) -> Iterator[None]:
    """Turn whatever a library raises inside into one sentence; errors of ours pass.

    Libraries raise more than they document (RecursionError, AssertionError, OSError for a name that is too long), and a
    panic in Rust code is no `Exception`.

    Args:
        what: what cannot be done, with the file, row or key; the library's own last line follows.

    Raises:
        RlcoreError: of type ``kind``, with the library's error as its cause.
    """
    try:
        yield
    except (RlcoreError, WorkerError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the type of ``error`` and the last line of its message, printable and of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON]} …"
    # file names and texts may hold characters that no encoding has
    text = text.encode("utf-8", "backslashreplace").decode()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
