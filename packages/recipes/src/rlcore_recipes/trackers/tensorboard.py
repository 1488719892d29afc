"""TensorBoard event files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rlcore.config import Config
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.settings import TensorboardSettings


class TensorboardTracker(Tracker):
    """Scalars and histograms by name, tables as text; a resumed run hides the steps it repeats."""

    def __init__(self, options: TensorboardSettings, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = run.start_step + 1 if run.start_step else None
        self._writer = SummaryWriter(str(run.out_dir / options.folder), purge_step=purge)
        described = {"config": run.config, "versions": run.versions}
        for name, values in described.items():
            text = json.dumps(dict(values), indent=2, default=str)
            self._writer.add_text(name, f"```json\n{text}\n```", run.start_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of ``step`` as scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), step)

    def log_histogram(self, name: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        bins = list(pairwise(edges))
        values = [(lower + upper) / 2 for lower, upper in bins]  # whose sums are given: in the middle of their bins
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * value for count, value in zip(counts, values)),
            sum_squares=sum(count * value**2 for count, value in zip(counts, values)),
            bucket_limits=[upper for _, upper in bins],
            bucket_counts=list(counts),
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()


def _cell(value: Any) -> str:
    """Return one line of Markdown that cannot end the table's cell."""
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def open_tensorboard(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``tensorboard``."""
    assert isinstance(options, TensorboardSettings)
    return TensorboardTracker(options, run)
