"""Code that depends on SGLang's version, or works around one of its habits.

Written for and tested with SGLang 0.5.21. Each entry states its reason and can be removed with it. In other modules are
the sampler (`rlcore_sglang.sampler`), the format of posted weights (`rlcore_sglang.payload`) and the check of updates
(`rlcore_kit.serving.weight_stream.checked`).
"""

from __future__ import annotations

import importlib.util
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from rlcore.errors import EngineError

OLDEST = (0, 5, 21)
"""The first tested version with sessions of weight updates and a weight version per range of tokens."""

CONTEXT_SLACK = 8
"""SGLang accepts prompts of up to ``context_length`` - 6 tokens, and reduces ``max_new_tokens`` silently."""


def require_sglang() -> None:
    """Raise `EngineError` if sglang is missing or too old; it is not imported."""
    if importlib.util.find_spec("sglang") is None:
        raise EngineError(
            "starting SGLang servers needs sglang, which is not installed; pip install 'rlcore[sglang]', or name "
            "running servers in rollout.sglang.urls"
        )
    version = metadata.version("sglang")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"sglang {version} is too old: rlcore-rollout-sglang needs {oldest} or newer; upgrade it")


def environment(on_cpu: bool, tp_size: int) -> dict[str, str]:
    """Return variables that SGLang reads from the environment only.

    - It refuses a ``context_length`` beyond the model's, which `CONTEXT_SLACK` may exceed; no token uses that.
    - It computes on the CPU only with SGLANG_USE_CPU_ENGINE.
    - Processes that share layers on the CPU need assigned cores, or a NUMA node each.
    - They try to use NCCL if torch's build has it, and fail; without a library of that name they use gloo.
    """
    chosen = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if on_cpu:
        chosen["SGLANG_USE_CPU_ENGINE"] = "1"
    if on_cpu and tp_size > 1:
        cores = sorted(os.sched_getaffinity(0))
        chosen["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(tp_size))
        chosen["SGLANG_NCCL_SO_PATH"] = "none"
    return chosen


def cpu_arguments() -> dict[str, Any]:
    """Return arguments for the CPU: SGLang's CPU kernels need AMX, and its overlapped scheduler needs a GPU."""
    chosen = {"device": "cpu", "disable_overlap_schedule": True, "watchdog_timeout": 600}
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or "amx_tile" not in cpu.read_text():
        chosen["attention_backend"] = "torch_native"
    return chosen
