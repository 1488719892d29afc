"""Conformance suite for trackers.

A plugin's test module holds::

    class TestMine(TrackerConformance):
        def make(self, info):
            return open_mine(MySettings(), info)

        def logged(self, info):
            return my_service.history(info.run_id)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rlcore.tracking import RunInfo, Tracker

METRICS = {
    "critic/score/mean": 0.5,
    "val-core/openai/gsm8k/reward/mean@1": 1.0,
    "reward/für alle": -1e-30,
    "timing_s/step": 1e12,
    "not/finite": math.nan,
    "not/bounded": -math.inf,
}
TABLE = (("prompt", "score"), (("a | b\n\tü \U0001f680", 1.0), ("", math.nan), ("x" * 10_000, None)))


class TrackerConformance:
    """The contract of `rlcore.tracking.Tracker`: subclass it, name the subclass ``Test…`` and implement `make`."""

    overwrites = True
    """Whether `logged` has, of a step that was logged again, what was logged last; otherwise what was logged first."""

    def make(self, info: RunInfo) -> Tracker:
        """Make a tracker of the run ``info``; a second tracker of the same ``run_id`` continues the run."""
        raise NotImplementedError

    def logged(self, info: RunInfo) -> Mapping[int, Mapping[str, float | None]] | None:
        """Return the logged metrics of the run by step; None if they cannot be read back."""
        return None

    @pytest.fixture
    def info(self, tmp_path: Path) -> RunInfo:
        """Make the description of a run."""
        return RunInfo(
            tmp_path,
            project="p",
            name="n",
            run_id="abc123",
            total_steps=10,
            config={"lr": 0.1, "nested": {"a": [None]}},
        )

    @pytest.fixture
    def tracker(self, info: RunInfo) -> Iterator[Tracker]:
        """Make a tracker that is closed after the test."""
        tracker = self.make(info)
        yield tracker
        tracker.close()

    def test_takes_numbers_of_all_kinds(self, tracker: Tracker, info: RunInfo) -> None:
        metrics = dict(METRICS)
        tracker.log({}, 0)
        tracker.log(metrics, 1)
        tracker.log({"late": 3.0}, 2)
        assert metrics.keys() == METRICS.keys(), "the tracker changed its argument"
        tracker.close()
        self._check(info, {1: {name: v for name, v in METRICS.items() if math.isfinite(v)}, 2: {"late": 3.0}})

    def test_takes_tables_of_all_kinds(self, tracker: Tracker) -> None:
        columns, rows = TABLE
        given: Sequence[Sequence[object]] = [list(row) for row in rows]
        tracker.log_table("val/generations", list(columns), given, 1)
        tracker.log_table("val/generations", list(columns), [], 2)
        assert [len(row) for row in given] == [2, 2, 2]

    def test_takes_histograms(self, tracker: Tracker) -> None:
        tracker.log_histogram("critic/advantages", [-1.5, 0.0, 1e-3, 2.0], [0, 7, 1], 1)
        tracker.log_histogram("critic/advantages", [0.0, 1.0], [1], 2)
        tracker.log({"loss": 1.0}, 2)

    def test_a_resumed_run_continues(self, info: RunInfo) -> None:
        """Steps after the checkpoint, logged before the run was interrupted, are logged again."""
        first = self.make(info)
        for step in (1, 2, 3):
            first.log({"loss": float(step)}, step)
        first.close()
        again = replace(info, start_step=2)
        second = self.make(again)
        second.log({"loss": 30.0}, 3)
        second.log({"loss": 40.0}, 4)
        second.close()
        repeated = 30.0 if self.overwrites else 3.0
        self._check(again, {1: {"loss": 1.0}, 2: {"loss": 2.0}, 3: {"loss": repeated}, 4: {"loss": 40.0}})

    def test_can_be_closed_twice_and_without_a_step(self, info: RunInfo) -> None:
        tracker = self.make(info)
        tracker.close()
        tracker.close()

    def _check(self, info: RunInfo, expected: Mapping[int, Mapping[str, float]]) -> None:
        found = self.logged(info)
        if found is None:
            return
        for step, metrics in expected.items():
            assert {name: found[step].get(name) for name in metrics} == pytest.approx(dict(metrics))
