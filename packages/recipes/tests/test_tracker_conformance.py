"""The trackers pass the conformance suite."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from rlcore import plugins
from rlcore.errors import RlcoreWarning
from rlcore.tracking import RunInfo, Tracker
from rlcore_kit.testing.tracker import TrackerConformance
from rlcore_recipes.trackers import open_trackers
from rlcore_recipes.trackers.console import ConsoleTracker
from rlcore_recipes.trackers.parquet import ParquetTracker
from rlcore_recipes.trackers.settings import (
    ConsoleSettings,
    JsonlSettings,
    MlflowSettings,
    SwanlabSettings,
    TensorboardSettings,
    TrackioSettings,
)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Failures in a tracker's thread are warnings."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        yield
    assert not [str(warning.message) for warning in caught if issubclass(warning.category, RlcoreWarning)]


class TestJsonl(TrackerConformance):
    def make(self, info: RunInfo) -> Tracker:
        return plugins.get("rlcore.trackers", "jsonl").build(JsonlSettings(), info)

    def logged(self, info: RunInfo) -> dict[int, dict[str, float]]:
        lines = [json.loads(line) for line in (info.out_dir / "metrics.jsonl").read_text().splitlines()]
        assert len({line["step"] for line in lines}) == len(lines)
        return {line["step"]: line for line in lines}


class TestTensorboard(TrackerConformance):
    def make(self, info: RunInfo) -> Tracker:
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


class TestMlflow(TrackerConformance):
    """In a data base of the run's; characters that MLflow refuses in names are replaced."""

    overwrites = False

    @pytest.fixture(autouse=True)
    def data_base(self, mlflow_store: Path, tmp_path: Path) -> None:
        shutil.copy(mlflow_store, tmp_path)

    def make(self, info: RunInfo) -> Tracker:
        return open_trackers({"mlflow": MlflowSettings()}, info)

    def logged(self, info: RunInfo) -> dict[int, dict[str, float]]:
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{info.out_dir}/mlflow.db")
        [experiment] = client.search_experiments(filter_string=f"name = '{info.project}'")
        [run] = client.search_runs([experiment.experiment_id])
        found: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for name in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, name):
                original = name.replace("_at_", "@")
                assert original not in found[point.step]
                found[point.step][original] = point.value
        return found


class TestTrackio(TrackerConformance):
    """In the data base of its local mode."""

    overwrites = False

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import trackio.sqlite_storage

        monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")

    def make(self, info: RunInfo) -> Tracker:
        return open_trackers({"trackio": TrackioSettings()}, info)

    def logged(self, info: RunInfo) -> dict[int, dict[str, float]]:
        found: defaultdict[int, dict[str, float]] = defaultdict(dict)
        with closing(sqlite3.connect(info.out_dir / "trackio" / "p.db")) as data_base:
            for step, metrics in data_base.execute("SELECT step, metrics FROM metrics"):
                assert not found[step].keys() & json.loads(metrics).keys()
                found[step] |= json.loads(metrics)
        return found


class TestParquet(TrackerConformance):
    def make(self, info: RunInfo) -> Tracker:
        return ParquetTracker(info.out_dir / "tables", info.start_step)


class TestConsole(TrackerConformance):
    def make(self, info: RunInfo) -> Tracker:
        return ConsoleTracker(ConsoleSettings(), info, Console(file=io.StringIO(), force_terminal=True))


del TrackerConformance
