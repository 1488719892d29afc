"""MLflow."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlcore.config import Config
from rlcore.tracking import RunInfo, Tracker
from rlcore_recipes.trackers.settings import MlflowSettings

RUN_ID = "rlcore.run_id"
"""The tag by which a resumed run finds its MLflow run; MLflow chooses ids itself."""
STEP = "training/global_step"
MOST_METRICS, MOST_PARAMETERS = 1000, 100  # of one request
LONGEST_VALUE = 6000  # characters of a parameter
MOST_TABLES = 50  # that the tag names: its value has 8,000 characters at most
TABLES_TAG = "mlflow.loggedArtifacts"  # by which MLflow's pages find tables


class MlflowTracker(Tracker):
    """One MLflow run, which a resumed run continues; ``MLFLOW_RUN_ID`` names another.

    MLflow cannot replace a metric: of the steps that a resumed run repeats, it keeps what was logged first.
    """

    def __init__(self, options: MlflowSettings, run: RunInfo) -> None:
        import mlflow

        own_store = options.uri is None and not mlflow.is_tracking_uri_set()
        uri = f"sqlite:///{(run.out_dir / 'mlflow.db').resolve()}" if own_store else options.uri
        self._client = mlflow.MlflowClient(uri)
        self._entities = mlflow.entities
        self._id = os.environ.get("MLFLOW_RUN_ID")
        if self._id is None:
            artifacts = (run.out_dir / "mlflow-artifacts").resolve().as_uri() if own_store else None
            self._id = self._found_or_made(options.experiment or run.project, artifacts, run)
        self._client.update_run(self._id, status="RUNNING")
        self._logged = self._last_step()
        self._tables = json.loads(self._client.get_run(self._id).data.tags.get(TABLES_TAG, "[]"))
        self._client.log_dict(self._id, {"config": run.config, "versions": dict(run.versions)}, "config.json")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of ``step``."""
        if step <= self._logged:
            return
        now = int(time.time() * 1000)
        points = [self._entities.Metric(_allowed(name), value, now, step) for name, value in metrics.items()]
        for part in _parts(points, MOST_METRICS):
            self._client.log_batch(self._id, metrics=part)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        path = f"{_allowed(name)}/step-{step:06d}.json"
        text = json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}, default=str)
        self._client.log_text(self._id, text, path)
        table = {"path": path, "type": "table"}
        self._tables = [*(other for other in self._tables if other != table), table][-MOST_TABLES:]
        self._client.set_tag(self._id, TABLES_TAG, json.dumps(self._tables))

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _found_or_made(self, experiment: str, artifacts: str | None, run: RunInfo) -> str:
        """Return the id of the MLflow run of ``run``."""
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment, artifacts)
        runs = self._client.search_runs([experiment_id], f"tags.`{RUN_ID}` = '{run.run_id}'", max_results=1)
        if runs:
            return str(runs[0].info.run_id)
        tags = {RUN_ID: run.run_id} | {f"version.{name}": version for name, version in run.versions.items()}
        made = str(self._client.create_run(experiment_id, tags=tags, run_name=run.name).info.run_id)
        parameters = [self._entities.Param(_allowed(name), value) for name, value in _flat(run.config)]
        for part in _parts(parameters, MOST_PARAMETERS):
            self._client.log_batch(made, params=part)
        return made

    def _last_step(self) -> int:
        """Return the last step that was logged before, -1 if there is none."""
        names = self._client.get_run(self._id).data.metrics
        steps = [
            point.step
            for name in ([STEP] if STEP in names else names)
            for point in self._client.get_metric_history(self._id, name)
        ]
        return max(steps, default=-1)


def _allowed(name: str) -> str:
    """Return ``name`` without characters that MLflow refuses."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:LONGEST_VALUE]


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def open_mlflow(options: Config, run: RunInfo) -> Tracker:
    """Build the tracker ``mlflow``."""
    assert isinstance(options, MlflowSettings)
    return MlflowTracker(options, run)
