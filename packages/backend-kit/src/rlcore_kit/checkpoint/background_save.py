"""Save a checkpoint while training continues: a thread writes what was copied to host memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Generic, TypeVar

from rlcore.engines.train import FileRecord
from rlcore.errors import CheckpointError
from rlcore_kit.checkpoint import rank_files
from rlcore_kit.checkpoint.background_thread import in_background
from rlcore_kit.checkpoint.rank_files import Gather, RankManifest

Part = TypeVar("Part")
Files = dict[str, FileRecord]

# Where threads compete for cores, training has priority over writing.
_NICENESS = 10


class BackgroundSave(Generic[Part]):
    """Saves checkpoints of one engine, one at a time.

    Args:
        rank: rank of this process.
        gather: see `rank_files.Gather`.
        write: writes the part of one rank without communicating, as `rank_files.write_part`.
        complete: adds the manifest, as `rank_files.complete`.
    """

    def __init__(
        self,
        rank: int,
        gather: Gather,
        write: Callable[[Path, Part, int], Files] = rank_files.write_part,  # type: ignore[assignment]
        complete: Callable[..., Files] = rank_files.complete,
    ) -> None:
        self._rank = rank
        self._gather = gather
        self._write, self._complete = write, complete
        self._written: Files = {}  # by the last save that has ended
        self._running: tuple[Path, Part, Callable[..., RankManifest], Future[Files]] | None = None

    def check_idle(self, path: Path) -> None:
        """Raise `CheckpointError` if an earlier save is unfinished; ``path`` is where the next one would go."""
        if self._running is not None:
            raise CheckpointError(
                f"cannot save to {path}: the save to {self._running[0]} is unfinished; call finish_save first"
            )

    def start(self, path: Path, part: Part, manifest: Callable[..., RankManifest]) -> None:
        """Begin to write ``part`` to the folder ``path``; the caller must not change ``part`` afterwards.

        Args:
            manifest: see `rlcore_kit.checkpoint.rank_files.complete`.

        Raises:
            CheckpointError: an earlier save is unfinished.
        """
        self.check_idle(path)
        writing = in_background(lambda: self._write(path, part, self._rank), "save", _NICENESS)
        self._running = (path, part, manifest, writing)

    def done(self) -> bool:
        """Return True if this rank has nothing left to write, or has failed."""
        return self._running is None or self._running[-1].done()

    def finish(self) -> Files:
        """Wait for all ranks and return the files that this rank wrote; empty if they were returned before.

        Collective, on the calling thread: the writing thread never communicates.

        Raises:
            CheckpointError: a rank could not write.
        """
        if self._running is None:
            written, self._written = self._written, {}
            return written
        (path, part, manifest, writing), self._running = self._running, None
        outcome: Files | CheckpointError
        try:
            outcome = writing.result()
        except CheckpointError as error:
            outcome = error
        except Exception as error:
            outcome = CheckpointError(f"rank {self._rank}: {type(error).__name__}: {error}")
        return self._complete(path, part, outcome, manifest, self._rank, self._gather)

    def save(self, path: Path, part: Part, manifest: Callable[..., RankManifest]) -> None:
        """Write on the calling thread; `finish` then returns the files. Collective.

        Raises:
            CheckpointError: a rank could not write.
        """
        outcome: Files | CheckpointError
        try:
            outcome = self._write(path, part, self._rank)
        except CheckpointError as error:
            outcome = error
        self._written = self._complete(path, part, outcome, manifest, self._rank, self._gather)
