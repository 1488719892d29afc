"""The trackers pass the conformance suite."""

from __future__ import annotations

import io
import json
import sqlite3
from collections import defaultdict
from contextlib import closing

import pytest
from rich.console import Console

from rlcore import plugins
from rlcore.tracking import RunInfo, Tracker
from rlcore_kit.testing.tracker import TrackerConformance
from rlcore_recipes.trackers import open_trackers
from rlcore_recipes.trackers.console import ConsoleTracker
from rlcore_recipes.trackers.settings import ConsoleSettings, JsonlSettings, SwanlabSettings, TensorboardSettings


class TestJsonl(TrackerConformance):
    def make(self, info: RunInfo) -> Tracker:
        return plugins.get("rlcore.trackers", "jsonl").build(JsonlSettings(), info)

    def logged(self, info: RunInfo) -> dict[int, dict[str, float]]:
        lines = [json.loads(line) for line in (info.out_dir / "metrics.jsonl").read_text().splitlines()]
        assert len({line["step"] for line in lines}) == len(lines)
        return {line["step"]: line for line in lines}


class TestTensorboard(TrackerConformance):
    def make(self, info: RunInfo) -> Tracker:
        pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
        return plugins.get("rlcore.trackers", "tensorboard").build(TensorboardSettings(), info)

    def logged(self, info: RunInfo) -> dict[int, dict[str, float]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(info.out_dir / "tensorboard"))
        events.Reload()
        found: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                assert name not in found[event.step]
                found[event.step][name] = event.value
        return found


class TestSwanlab(TrackerConformance):
    """In local mode, whose files the dashboard reads."""

    def make(self, info: RunInfo) -> Tracker:
        return open_trackers({"swanlab": SwanlabSettings(mode="local")}, info)

    def logged(self, info: RunInfo) -> dict[int, dict[str, float]]:
        folder = max((info.out_dir / "swanlog").glob("run-*"))
        found: defaultdict[int, dict[str, float]] = defaultdict(dict)
        with closing(sqlite3.connect(info.out_dir / "swanlog" / "runs.swanlab")) as data_base:
            columns = data_base.execute(
                "SELECT tag.name, tag.folder FROM tag JOIN experiment ON tag.experiment_id = experiment.id "
                "WHERE experiment.run_id = ?",
                [folder.name],
            )
            for name, place in columns:
                for line in (folder / "logs" / place / "1000.log").read_text().splitlines():
                    point = json.loads(line)
                    assert name not in found[point["index"]]
                    found[point["index"]][name] = point["data"]
        return found


class TestConsole(TrackerConformance):
    def make(self, info: RunInfo) -> Tracker:
        return ConsoleTracker(ConsoleSettings(), info, Console(file=io.StringIO(), force_terminal=True))


del TrackerConformance
