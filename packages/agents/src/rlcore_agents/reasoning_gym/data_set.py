"""``rlcore data reasoning-gym``: problems with all that their scorers need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rlcore.errors import DataError, PluginError
from rlcore_agents.reasoning_gym.settings import PACKAGE, ReasoningGymData


def reasoning_gym(options: ReasoningGymData) -> dict[str, list[dict[str, Any]]]:
    """Generated problems of over 100 kinds (reasoning-gym), scored by the reward reasoning_gym."""
    if not PACKAGE.installed:
        raise PluginError(f"the data set reasoning-gym {PACKAGE.advice}")
    request = options.model_dump(exclude={"instruction"}, mode="json")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "rlcore_agents.reasoning_gym.generation"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise DataError(f"reasoning-gym failed: {last}")
    answer = json.loads(process.stdout)
    if "error" in answer:
        raise DataError(answer["error"])
    return {
        split: [_row(problem, options.instruction, split, index) for index, problem in enumerate(problems)]
        for split, problems in answer["splits"].items()
    }


def _row(problem: dict[str, Any], instruction: str, split: str, index: int) -> dict[str, Any]:
    extra = {name: problem[name] for name in ("task", "entry", "config", "source_index")}
    return {
        "prompt": [{"role": "user", "content": f"{problem['question']}\n\n{instruction}".strip()}],
        "ground_truth": problem["answer"],  # null where a task has many right answers and names none
        "data_source": f"reasoning_gym/{problem['task']}",
        "extra_info": {**extra, "split": split, "index": index},
    }
