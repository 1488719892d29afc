"""Run a task of the gate in a process of any environment that has rlcore."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from rlcore.errors import RlcoreError
from rlcore_recipes.gate.results import RunResult, result_of
from rlcore_recipes.gate.tasks import GateTask

TIMEOUT_S = 1800.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
"""One thread per run: runs are made next to each other, and models are small."""
SHOWN = 20
"""Lines of the output of a run that failed."""


def arguments(task: GateTask, seed: int, out_dir: Path) -> list[str]:
    """Return the arguments of ``rlcore``."""
    keys: dict[str, Any] = {**task.all_keys, "seed": seed, "trainer.out_dir": out_dir}
    return ["run", task.recipe, *(f"{key}={value}" for key, value in keys.items())]


def run_task(task: GateTask, seed: int, root: Path, python: Path, source: str) -> RunResult:
    """Run ``task`` and return its result. Its folder is ``root/runs/SOURCE/TASK-SEED``.

    Args:
        root: where its problem was prepared.
        python: interpreter of the environment to run in.
        source: name of the version that this environment has.

    Raises:
        RlcoreError: the run failed or took more than `TIMEOUT_S`; the message ends with the last lines of its output.
    """
    out_dir = root / "runs" / source.replace(" ", "-") / f"{task.name}-{seed}"
    shutil.rmtree(out_dir, ignore_errors=True)  # of an earlier run of the gate
    command = [str(python), "-m", "rlcore", *arguments(task, seed, out_dir)]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env={**environment, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise RlcoreError(f"{task.name} with seed {seed} on {source} took more than {TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise RlcoreError(f"{python} cannot be started: {error.strerror or error}") from None
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-SHOWN:])
        raise RlcoreError(f"{task.name} with seed {seed} on {source} ended with exit code {done.returncode}:\n{last}")
    return result_of(task, seed, read_metrics(out_dir), time.perf_counter() - started, source)


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    """Read the metrics that a run logged."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
