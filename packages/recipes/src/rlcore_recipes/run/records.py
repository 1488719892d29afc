"""What a step has for trackers besides its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlcore.tracking import Tracker
from rlcore_recipes.rollouts.invalid import Reasons


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges, of which there is one more."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """Rows, and the titles of their columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass
class Records:
    """Histograms and tables of the step under way, by name.

    Attributes:
        invalid: why episodes were invalid since the run was started.
    """

    histograms: dict[str, Histogram] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    invalid: Reasons = field(default_factory=Reasons)

    def hand_over(self, tracker: Tracker, step: int) -> None:
        """Give histograms and tables to ``tracker``, and forget them."""
        for name, histogram in self.histograms.items():
            tracker.log_histogram(name, histogram.edges, histogram.counts, step)
        for name, table in self.tables.items():
            tracker.log_table(name, table.columns, table.rows, step)
        self.histograms, self.tables = {}, {}
