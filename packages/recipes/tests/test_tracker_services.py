"""Each tracking service's own tools read back what its tracker wrote, without a network."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlcore.errors import RlcoreWarning
from rlcore.tracking import RunInfo
from rlcore_kit.serving.ports import unused_port
from rlcore_recipes.trackers import open_trackers
from rlcore_recipes.trackers.settings import (
    MlflowSettings,
    ParquetSettings,
    SwanlabSettings,
    TensorboardSettings,
    TrackioSettings,
)


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    return RunInfo(
        tmp_path,
        project="p",
        name="n",
        run_id="abc123",
        total_steps=10,
        config={"lr": 0.1, "nested": {"a": None}},
        versions={"torch": "2.13.0"},
    )


# --- a full disk ----------------------------------------------------------------------------------------------------


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let writes of this process beyond ``size`` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writing thread
def test_on_a_full_disk_each_tracker_warns_and_none_raises(
    run: RunInfo, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trackio.sqlite_storage

    shutil.copy(mlflow_store, run.out_dir)
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", run.out_dir)
    sections = {
        "tensorboard": TensorboardSettings(),
        "mlflow": MlflowSettings(),
        "trackio": TrackioSettings(),
        "parquet": ParquetSettings(),
    }
    text = "".join(random.Random(0).choices("abcdefgh", k=1 << 18))
    with warnings.catch_warnings(record=True, action="always") as caught:
        trackers = open_trackers(sections, run)
        with no_file_beyond(1 << 16):
            for step in (1, 2):
                trackers.log_table("rollouts", ["text"], [[text]], step)
                trackers.log({"loss": 1.0}, step)
            trackers.close()
    messages = [str(warning.message) for warning in caught if warning.category is RlcoreWarning]
    for name in ("jsonl", "mlflow", "parquet"):
        assert sum(f"tracker {name} " in message for message in messages) == 1, messages
    assert len(messages) <= 5, messages


# --- SwanLab --------------------------------------------------------------------------------------------------------


@pytest.fixture
def swanlab_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("MODE", "LOG_DIR", "LOGDIR", "RESUME", "RUN_ID", "API_KEY"):
        monkeypatch.delenv(f"SWANLAB_{name}", raising=False)
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "account"))
    return monkeypatch


@contextmanager
def dashboard(folder: Path) -> Iterator[str]:
    """The address of ``swanlab watch`` on ``folder``."""
    port = unused_port()
    command = [Path(sys.executable).parent / "swanlab", "watch", folder, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def answer(url: str) -> dict:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url) as response:
                return json.load(response)["data"]
        except urllib.error.URLError:
            assert time.monotonic() < deadline, "the dashboard does not answer"
            time.sleep(0.1)


@pytest.mark.slow
def test_swanlab_dashboard_shows_a_local_run_and_its_continuation(
    run: RunInfo, swanlab_variables: pytest.MonkeyPatch
) -> None:
    for start in (0, 2):
        trackers = open_trackers({"swanlab": SwanlabSettings(mode="local")}, replace(run, start_step=start))
        for step in range(start + 1, start + 4):
            trackers.log({"critic/score/mean": 10.0 * start + step}, step)
        trackers.log_table("val/generations", ["prompt", "score"], [["1 + 1", 1.0]], start + 3)
        trackers.log_histogram("critic/advantages", [0.0, 1.0], [3], start + 3)
        trackers.close()
    with dashboard(run.out_dir / "swanlog") as url:
        project = answer(f"{url}/api/v1/project")
        first, second = project["experiments"]
        experiment = f"{url}/api/v1/experiment/{second['id']}"
        points = answer(f"{experiment}/tag/critic/score/mean")["list"]
        [texts] = answer(f"{experiment}/tag/val/generations")["list"]
    assert project["name"] == "p"
    config = {name: item["value"] for name, item in second["config"].items()}
    assert config == {**run.config, "versions": {"torch": "2.13.0"}}
    assert (first["status"], second["status"]) == (1, 1)  # both finished
    assert [(point["index"], point["data"]) for point in points] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]
    assert texts["data"] == ["prompt: 1 + 1\n\nscore: 1.0"]


def test_swanlab_goes_by_its_own_variables(run: RunInfo, swanlab_variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    swanlab_variables.setenv("SWANLAB_MODE", "offline")
    swanlab_variables.setenv("SWANLAB_LOG_DIR", str(tmp_path / "mine"))
    swanlab_variables.setenv("SWANLAB_RUN_ID", "from_environment")
    swanlab_variables.setenv("SWANLAB_RESUME", "must")
    open_trackers({"swanlab": SwanlabSettings()}, run).close()
    [folder] = (tmp_path / "mine").glob("run-*")
    assert folder.name.endswith("-from_environment")
    swanlab_variables.delenv("SWANLAB_RUN_ID")
    swanlab_variables.setenv("SWANLAB_RESUME", "never")
    open_trackers({"swanlab": SwanlabSettings()}, run).close()
    [other] = set((tmp_path / "mine").glob("run-*")) - {folder}
    assert not other.name.endswith("abc123")


def test_swanlab_without_an_account_is_offline(run: RunInfo, swanlab_variables: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings(record=True, action="always") as caught:
        trackers = open_trackers({"swanlab": SwanlabSettings()}, run)
        trackers.log({"loss": 1.0}, 1)
        trackers.close()
    [message] = [str(warning.message) for warning in caught if warning.category is RlcoreWarning]
    assert re.search(
        "SwanLab cannot be reached .*no API key.*: the run is tracked offline, and `swanlab sync`", message
    )
    [file] = run.out_dir.glob("swanlog/run-*-abc123/run-abc123.swanlab")
    assert b"loss" in file.read_bytes()


# --- MLflow ---------------------------------------------------------------------------------------------------------


def test_mlflow_store_has_metrics_parameters_and_tables(run: RunInfo, mlflow_store: Path) -> None:
    import mlflow

    shutil.copy(mlflow_store, run.out_dir)
    for start in (0, 1):
        trackers = open_trackers({"mlflow": MlflowSettings()}, replace(run, start_step=start))
        trackers.log({"val-core/gsm8k/reward/mean@1": 0.5, "a, b": 2.0}, start + 1)
        trackers.log_table("val/generations", ["prompt", "score"], [["1 + 1", 1.0]], start + 1)
        trackers.close()
    client = mlflow.MlflowClient(f"sqlite:///{run.out_dir}/mlflow.db")
    [found] = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert (found.info.run_name, found.info.status) == ("n", "FINISHED")
    assert found.data.params == {"lr": "0.1", "nested.a": "None"}
    assert found.data.tags["version.torch"] == "2.13.0"
    history = client.get_metric_history(found.info.run_id, "val-core/gsm8k/reward/mean_at_1")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.5)]
    assert found.data.metrics["a_ b"] == 2.0
    [table] = (run.out_dir / "mlflow-artifacts").glob("*/artifacts/val/generations/step-000001.json")
    assert json.loads(table.read_text()) == {"columns": ["prompt", "score"], "data": [["1 + 1", 1.0]]}
    assert [table["path"] for table in json.loads(found.data.tags["mlflow.loggedArtifacts"])] == [
        "val/generations/step-000001.json",
        "val/generations/step-000002.json",
    ]
    config = json.loads((table.parents[2] / "config.json").read_text())
    assert config == {"config": run.config, "versions": {"torch": "2.13.0"}}


def test_mlflow_goes_by_its_own_variables(
    run: RunInfo, mlflow_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{shutil.copy(mlflow_store, tmp_path / 'elsewhere.db')}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("mine", (tmp_path / "artifacts").as_uri())
    mine = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", mine)
    trackers = open_trackers({"mlflow": MlflowSettings()}, run)
    trackers.log({"loss": 1.0}, 1)
    trackers.close()
    assert client.get_run(mine).data.metrics == {"loss": 1.0}
    assert not (run.out_dir / "mlflow.db").exists()


def test_an_mlflow_server_that_does_not_answer_is_a_warning(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with warnings.catch_warnings(record=True, action="always") as caught:
        trackers = open_trackers({"mlflow": MlflowSettings(uri="http://127.0.0.1:9")}, run)
        trackers.log({"loss": 1.0}, 1)
        trackers.close()
    [message] = [str(warning.message) for warning in caught if warning.category is RlcoreWarning]
    assert message.startswith("tracker mlflow could not be started: MlflowException: API request to http://127.0.0.1:9")


# --- Trackio --------------------------------------------------------------------------------------------------------


def test_trackio_data_base_has_metrics_tables_and_histograms(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio.sqlite_storage

    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", run.out_dir)
    trackers = open_trackers({"trackio": TrackioSettings()}, run)
    trackers.log_table("val/generations", ["prompt", "score"], [["1 + 1", 1.0]], 1)
    trackers.log_histogram("critic/advantages", [0.0, 0.5, 1.0], [3, 4], 1)
    trackers.log({"critic/score/mean": 0.5}, 1)
    trackers.close()
    [found] = trackio.Api().runs("p")
    assert found.name == "n-abc123"
    assert found.config["lr"] == 0.1
    logged: dict = {}
    for line in trackio.SQLiteStorage.get_logs("p", found.name):
        assert line["step"] == 1
        logged |= line
    assert logged["critic/score/mean"] == 0.5
    assert logged["critic/advantages"] == {"_type": "trackio.histogram", "bins": [0.0, 0.5, 1.0], "values": [3, 4]}
    assert logged["val/generations"]["_value"] == [{"prompt": "1 + 1", "score": 1.0}]


# --- Parquet --------------------------------------------------------------------------------------------------------


def test_parquet_has_a_file_for_each_table_and_step(run: RunInfo) -> None:
    rows = [["1 + 1", 1.0, {"format": 1.0}, [1, 2], 1], ["lone \ud800", None, {}, [], "x"]]
    columns = ["prompt", "score", "parts", "ids", "mixed"]
    for start in (0, 1):
        trackers = open_trackers({"parquet": ParquetSettings()}, replace(run, start_step=start))
        for step in (start + 1, start + 2):
            trackers.log_table("rollouts", columns, rows, step)
        trackers.close()
        (run.out_dir / "tables" / "rollouts" / "mine.parquet").touch()
    names = sorted(path.name for path in (run.out_dir / "tables" / "rollouts").iterdir())
    assert names == ["mine.parquet", *(f"step-00000{step}.parquet" for step in (1, 2, 3))]
    table = pq.read_table(run.out_dir / "tables" / "rollouts" / "step-000003.parquet")
    assert table["prompt"].to_pylist() == ["1 + 1", "lone \\ud800"]
    assert table["score"].to_pylist() == [1.0, None]
    assert table["parts"].to_pylist() == [{"format": 1.0}, {"format": None}]
    assert table["ids"].to_pylist() == [[1, 2], []]
    assert table["mixed"].to_pylist() == ["1", "x"]
    assert table["step"].to_pylist() == [3, 3]
