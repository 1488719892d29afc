"""Rows of data files of which no sample is made: counted by reason, the first of each named."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LeftOut:
    """Rows without a sample, by the reason.

    Attributes:
        counts: number of rows by reason, such as "with two equal sides".
        first: file and row of the first one of each reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count the row at ``where``, which is "file, row number"."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def notes(self, rows: str) -> list[str]:
        """Return a line for each reason; ``rows`` is what the rows are, such as "pairs"."""
        return [
            f"{count:,} {rows} {reason} are left out, the first: {self.first[reason]}"
            for reason, count in self.counts.items()
        ]
