"""Each tracking service's own tools read back what its tracker wrote, without a network."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlcore.errors import RlcoreWarning
from rlcore.tracking import RunInfo
from rlcore_recipes.trackers import open_trackers
from rlcore_recipes.trackers.settings import SwanlabSettings


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


# --- SwanLab --------------------------------------------------------------------------------------------------------


@pytest.fixture
def swanlab_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("MODE", "LOG_DIR", "LOGDIR", "RESUME", "RUN_ID", "API_KEY"):
        monkeypatch.delenv(f"SWANLAB_{name}", raising=False)
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "account"))
    return monkeypatch


@pytest.fixture
def dashboard(tmp_path: Path) -> Iterator[str]:
    """The address of ``swanlab watch`` on the run's folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "swanlab", "watch", tmp_path / "swanlog", "--port", str(port)]
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
    run: RunInfo, swanlab_variables: pytest.MonkeyPatch, dashboard: str
) -> None:
    for start in (0, 2):
        trackers = open_trackers({"swanlab": SwanlabSettings(mode="local")}, replace(run, start_step=start))
        for step in range(start + 1, start + 4):
            trackers.log({"critic/score/mean": 10.0 * start + step}, step)
        trackers.log_table("val/generations", ["prompt", "score"], [["1 + 1", 1.0]], start + 3)
        trackers.log_histogram("critic/advantages", [0.0, 1.0], [3], start + 3)
        trackers.close()
    project = answer(f"{dashboard}/api/v1/project")
    assert project["name"] == "p"
    first, second = project["experiments"]
    assert {name: item["value"] for name, item in second["config"].items()} == {
        **run.config,
        "versions": {"torch": "2.13.0"},
    }
    assert (first["status"], second["status"]) == (1, 1)  # both finished
    points = answer(f"{dashboard}/api/v1/experiment/{second['id']}/tag/critic/score/mean")["list"]
    assert [(point["index"], point["data"]) for point in points] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]
    [texts] = answer(f"{dashboard}/api/v1/experiment/{second['id']}/tag/val/generations")["list"]
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
