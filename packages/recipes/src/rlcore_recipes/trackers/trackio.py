"""Trackio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlcore.config import Config
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.settings import TrackioSettings


class TrackioTracker(Tracker):
    """One Trackio run, which a resumed run continues.

    Trackio finds a run by its name alone, so the name has the run's id in it. It cannot replace a metric: of the steps
    that a resumed run repeats, it keeps what was logged first.
    """

    def __init__(self, options: TrackioSettings, run: RunInfo) -> None:
        import trackio

        self._trackio = trackio
        project, name = options.project or run.project, f"{run.name}-{run.run_id}"
        last = trackio.SQLiteStorage.get_max_step_for_run(project, name)  # of a local run; in a Space that is unknown
        self._logged = -1 if last is None else last
        self._run = trackio.init(
            project=project,
            name=name,
            group=options.group,
            space_id=options.space_id,
            config={**run.config, "versions": dict(run.versions)},
            resume="allow",
            embed=False,
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of ``step``."""
        self._log(metrics, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._log({name: self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step)

    def log_histogram(self, name: str, edges: Sequence[float], counts: Sequence[int], step: int) -> None:
        self._log({name: self._trackio.Histogram(np_histogram=(list(counts), list(edges)))}, step)

    def close(self) -> None:
        self._run.finish()

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if step > self._logged and values:
            self._run.log(dict(values), step=step)


def open_trackio(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``trackio``."""
    assert isinstance(options, TrackioSettings)
    return TrackioTracker(options, run)
