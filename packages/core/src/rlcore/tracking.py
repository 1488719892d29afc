"""`Tracker`: receives the metrics of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRACKER_INTERFACE = 1


@dataclass(frozen=True)
class RunInfo:
    """What a tracker learns about the run.

    Attributes:
        run_id: stays the same when a run is resumed; trackers continue the same remote run.
        total_steps: planned steps, for progress displays.
        config: the resolved configuration as plain values.
        start_step: steps done before, when the run was resumed; what was logged after it is about to be repeated.
        versions: what the run's code is: versions of packages by name, and the commit of the working folder.
    """

    out_dir: Path
    project: str
    name: str
    run_id: str
    total_steps: int
    config: Mapping[str, Any]
    start_step: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)


class Tracker(ABC):
    """Receives metrics, tables and histograms; on rank zero only, made, called and closed by one thread.

    That thread is the tracker's, and training does not wait for it. A tracker that raises an exception is warned about
    once; it never ends the run.
    """

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table such as validation generations; ignored by trackers without tables."""
        return

    def log_histogram(self, name: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        """Log how values are distributed; ignored by trackers without histograms.

        Args:
            edges: ascending and finite, one more than ``counts``.
            counts: values between an edge and the next.
        """
        return

    def progress(self, what: str, done: int, total: int, step: int) -> None:
        """Show the progress of the current step; called often, from any thread. Ignored by trackers that show none.

        Args:
            what: the items, such as "completions generated".
        """
        return

    def close(self) -> None:
        """Flush; idempotent."""
        return
