"""Train a task of the gate in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rlcore import plugins
from rlcore.cli.recipes import check_packages
from rlcore.config import load_config
from rlcore_recipes.gate.problems import prepare
from rlcore_recipes.gate.results import RunResult, result_of
from rlcore_recipes.gate.run import arguments, read_metrics
from rlcore_recipes.gate.tasks import GateTask


def train_here(task: GateTask, overrides: Sequence[str], seed: int, root: Path, out_dir: Path) -> RunResult:
    """Train ``task`` with ``overrides`` in the working folder ``root``, and return the result.

    Raises:
        RlcoreError: the configuration is not valid, or the run fails.
    """
    prepare(task.files, root)
    plugin = plugins.get("rlcore.recipes", task.recipe)
    config = load_config(plugin.config_class(), None, [*arguments(task, seed, out_dir)[2:], *overrides])
    check_packages(config)
    started = time.perf_counter()
    plugin.build(config)
    return result_of(task, seed, read_metrics(out_dir), time.perf_counter() - started, "this process")
