"""Metrics of the machine, and what the code is."""

from __future__ import annotations

import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rlcore_recipes.run.system_metrics import SystemMetrics, gpu_samplers, machine_sampler, system_metrics
from rlcore_recipes.run.versions import code_versions


def until_sampled(metrics: SystemMetrics, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(metrics._samples) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_means_of_the_samples_between_two_steps() -> None:
    values = iter(range(1, 4))
    metrics = SystemMetrics(0.001, [lambda: {"system/x": float(next(values))}])  # ends with an exception: left out
    until_sampled(metrics, 3)
    assert metrics.take() == {"system/x": 2.0}
    metrics.close()


def test_a_step_shorter_than_the_interval_has_the_last_sample() -> None:
    metrics = SystemMetrics(60.0, [lambda: {"system/x": 1.0}])
    until_sampled(metrics, 1)
    assert metrics.take() == metrics.take() == {"system/x": 1.0}
    metrics.close()


def test_machine() -> None:
    found, resident = machine_sampler()(), psutil.Process(os.getpid()).memory_info().rss
    assert 0 <= found["system/cpu_percent"] <= 100
    assert found["system/process_memory_gib"] == pytest.approx(resident / 2**30, 0.1)
    with system_metrics(None) as take:
        assert take() == {}


def test_gpus_as_their_driver_reports_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU here: NVIDIA's functions, replaced by what they return for two slices of one."""
    import pynvml

    def refuse(handle: int) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name, function in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50 + handle, memory=0),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=2**31, total=2**33),
        "nvmlDeviceGetPowerUsage": refuse,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 40,
    }.items():
        monkeypatch.setattr(pynvml, name, function)
    _, second = gpu_samplers()
    expected = {
        "system/gpu_1/utilization_percent": 51,
        "system/gpu_1/memory_used_gib": 2,
        "system/gpu_1/temperature_c": 40,
    }
    assert second() == second() == expected


def test_versions_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "commit" not in code_versions()
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    found = code_versions()
    assert found["commit"] == git("rev-parse", "HEAD")
    assert found["torch"] == version("torch")
    (tmp_path / "file").write_text("2")
    assert code_versions()["commit"] == f"{found['commit']}-dirty"
