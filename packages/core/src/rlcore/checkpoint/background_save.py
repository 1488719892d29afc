"""Saving while training goes on: a thread writes what has been copied to host memory."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rlcore.background import in_background
from rlcore.checkpoint.rank_files import Gather, RankPart, complete, write_part
from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError

# Where threads compete for cores, training goes before writing; whoever waits for the writer leaves it the core.
_NICENESS = 10


class BackgroundSave:
    """The saves of one engine, one at a time."""

    def __init__(self, rank: int, gather: Gather) -> None:
        self._rank = rank
        self._gather = gather
        self._written: dict[str, FileRecord] = {}  # by the last save that has ended
        self._running: tuple[Path, RankPart, Mapping[str, Any], Future[FileRecord]] | None = None

    def check_idle(self, path: Path) -> None:
        """Raise CheckpointError if another save than the one to ``path`` has not been finished."""
        if self._running is not None:
            raise CheckpointError(f"cannot save to {path}: finish_save has not been called for {self._running[0]}")

    def start(self, path: Path, part: RankPart, facts: Mapping[str, Any]) -> None:
        """Begin to write ``part``, which nobody changes any more, to the folder ``path``.

        Args:
            facts: see `rlcore.checkpoint.rank_files.complete`.
        """
        self.check_idle(path)
        writing = in_background(lambda: write_part(path, part, self._rank), "save", _NICENESS)
        self._running = (path, part, facts, writing)

    def done(self) -> bool:
        return self._running is None or self._running[-1].done()

    def finish(self) -> dict[str, FileRecord]:
        """Wait for all ranks; the files of this one, or nothing if they have been asked for.

        Collective, on the calling thread: the writing one never communicates.

        Raises:
            CheckpointError: a rank could not write.
        """
        if self._running is None:
            written, self._written = self._written, {}
            return written
        (path, part, facts, writing), self._running = self._running, None
        outcome: FileRecord | CheckpointError
        try:
            outcome = writing.result()
        except CheckpointError as error:
            outcome = error
        except Exception as error:
            outcome = CheckpointError(f"rank {self._rank}: {type(error).__name__}: {error}")
        return complete(path, part, outcome, facts, self._rank, self._gather)

    def save(self, path: Path, part: RankPart, facts: Mapping[str, Any]) -> None:
        """Write at once, on the calling thread; `finish` then gives the files. Collective.

        Raises:
            CheckpointError: a rank could not write.
        """
        outcome: FileRecord | CheckpointError
        try:
            outcome = write_part(path, part, self._rank)
        except CheckpointError as error:
            outcome = error
        self._written = complete(path, part, outcome, facts, self._rank, self._gather)
