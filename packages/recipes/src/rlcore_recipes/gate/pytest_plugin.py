"""Pytest plugin of the learning gate: the fixture `learns`. It is loaded in every pytest run, so it imports nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def gate_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which the tasks of the gate run; a problem is prepared once in a session."""
    return tmp_path_factory.mktemp("gate")


@pytest.fixture
def learns(gate_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that trains a task of the gate and fails the test if the policy does not learn.

    ::

        def test_my_estimator_learns(learns):
            learns("grpo-letters", "algorithm.advantage=mine")

    Arguments are a task (``rlcore-gate list``), configuration keys as on the command line, ``seed`` (0), and
    ``at_least``, the score that counts as learned (that of the task). The run is made in this process, so that what a
    test module registers is found. The function returns the `rlcore_recipes.gate.results.RunResult`.
    """

    def train(task: str, *overrides: str, seed: int = 0, at_least: float | None = None) -> Any:
        from rlcore_recipes.gate.in_process import train_here
        from rlcore_recipes.gate.tasks import find_tasks

        (chosen,) = find_tasks([task])
        monkeypatch.chdir(gate_folder)
        result = train_here(chosen, overrides, seed, gate_folder, tmp_path / f"{task}-{seed}")
        wanted = chosen.learned if at_least is None else at_least
        if result.score < wanted:
            curve = " ".join(f"{value:.2f}" for value in result.values)
            keys = " ".join(overrides) or "no further keys"
            pytest.fail(
                f"{task} with {keys} is not learned: {chosen.metric} ends at {result.score:.3f}, and {wanted:g} counts "
                f"as learned; its values are {curve}",
                pytrace=False,
            )
        return result

    return train
