"""Load and memory of this machine and its GPUs, sampled while a step runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import psutil

GIB = 2**30
Sampler = Callable[[], Mapping[str, float]]


class SystemMetrics:
    """Samples every ``interval_s`` seconds in a daemon thread, so that a driver that hangs holds up no step."""

    def __init__(self, interval_s: float, samplers: Iterable[Sampler]) -> None:
        self._samplers = list(samplers)
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._samples: list[dict[str, float]] = []
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="system metrics", daemon=True).start()

    def take(self) -> dict[str, float]:
        """Return the means of the samples since the last call, and of the one before it."""
        with self._lock:
            samples, self._samples = self._samples, self._samples[-1:]
        names = {name: None for sample in samples for name in sample}
        return {name: fmean(sample[name] for sample in samples if name in sample) for name in names}

    def close(self) -> None:
        """End the thread."""
        self._ended.set()

    def _work(self) -> None:
        while True:
            found: dict[str, float] = {}
            for sampler in list(self._samplers):
                try:
                    found |= sampler()
                except Exception:  # a driver that does not answer any more, a container without /proc
                    self._samplers.remove(sampler)
            with self._lock:
                self._samples.append(found)
            if self._ended.wait(self._interval_s):
                return


@contextmanager
def system_metrics(interval_s: float | None) -> Iterator[Callable[[], dict[str, float]]]:
    """Sample in the block, and yield `SystemMetrics.take`; with None, sample nothing."""
    if interval_s is None:
        yield dict
        return
    metrics = SystemMetrics(interval_s, [machine_sampler(), *gpu_samplers()])
    try:
        yield metrics.take
    finally:
        metrics.close()


def machine_sampler() -> Sampler:
    """Return what reads the load of the processors, and the memory of the machine and of this process."""
    process = psutil.Process()
    psutil.cpu_percent()  # the first call has nothing to compare with

    def sample() -> dict[str, float]:
        memory = psutil.virtual_memory()
        return {
            "system/cpu_percent": psutil.cpu_percent(),
            "system/memory_percent": memory.percent,
            "system/memory_used_gib": (memory.total - memory.available) / GIB,
            "system/process_memory_gib": process.memory_info().rss / GIB,
        }

    return sample


def gpu_samplers() -> list[Sampler]:
    """Return one sampler for each GPU that NVIDIA's driver knows on this machine."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:  # no driver, no GPU
        return []
    return [_gpu_sampler(pynvml, handle, f"system/gpu_{index}") for index, handle in enumerate(handles)]


def _gpu_sampler(pynvml: Any, handle: Any, name: str) -> Sampler:
    reads: dict[str, Callable[[], float]] = {
        "utilization_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_used_gib": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
        "power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }

    def sample() -> dict[str, float]:
        found = {}
        for what, read in list(reads.items()):
            try:
                found[f"{name}/{what}"] = float(read())
            except pynvml.NVMLError_NotSupported:  # virtual GPUs and MIG slices do not have all of them
                del reads[what]
        return found

    return sample
