"""The processes of one run: torchrun starts several, and all of them run the same program.

Training engines set the process group up; until one is built, and with one process, everything here is a plain call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from rlcore.controller.local import process_executor

T = TypeVar("T")

executor = process_executor()
"""Keeps processes that run the same program in step; a driver of Ray workers is alone, and every call a plain one."""


def is_main() -> bool:
    """True on the process that tracks, prints and writes single files."""
    return executor.is_main


def launched_as_main() -> bool:
    """True on the process that the launcher made rank 0; known before there is a process group."""
    return int(os.environ.get("RANK", "0")) == 0


def on_rank_zero(work: Callable[[], T]) -> T:
    """Do ``work`` on rank 0 only; every rank gets its result, or its error."""
    return executor.on_main(work)


def all_gather(value: T) -> list[T]:
    """Return every rank's ``value``, by rank."""
    return executor.all_gather(value)
