"""The tasks of the learning gate: a recipe with settings, on a problem that it learns in seconds on one core."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rlcore.errors import ConfigError
from rlcore_recipes.gate.problems import PROBLEMS, Keys, Problem

VALIDATION = "val-core/{source}/reward/mean@1"


@dataclass(frozen=True)
class GateTask:
    """A task.

    Attributes:
        algorithm: its row in tables.
        problem: the key of `PROBLEMS`: its column.
        recipe: what ``rlcore run`` takes.
        metric: the metric whose last values are the score of a run; higher is better.
        last: how many of its last values, whose mean is the score.
        learned: score from which the task counts as learned.
        keys: configuration keys besides those of the problem.
        margin: smallest drop of the score that counts as harm.
    """

    algorithm: str
    problem: str
    recipe: str
    metric: str
    learned: float
    keys: Keys
    last: int = 3
    margin: float = 0.1

    @property
    def name(self) -> str:
        """``algorithm-problem``."""
        return f"{self.algorithm}-{self.problem}"

    @property
    def all_keys(self) -> dict[str, Any]:
        """The configuration of a run but for its seed and its folder."""
        return {**self.files.keys, **self.keys}

    @property
    def definition(self) -> str:
        """A hash of what is run and measured: results of another definition cannot be compared."""
        parts = (self.recipe, self.metric, self.last, sorted((key, str(value)) for key, value in self.all_keys.items()))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def files(self) -> Problem:
        """The problem."""
        return PROBLEMS[self.problem]


_LETTERS: dict[str, Any] = {
    "data.train_batch_size": 16, "rollout.n": 4, "actor.optim.lr": 1e-2,
    "trainer.total_steps": 25, "trainer.test_freq": -1,
}  # fmt: skip
_ARITHMETIC: dict[str, Any] = {
    "data.train_batch_size": 32, "rollout.n": 8, "actor.mini_batch_size": 16, "actor.old_logprobs": "rollout",
    "actor.optim.lr": 5e-4, "actor.optim.betas": "[0.9, 0.95]", "actor.optim.warmup_steps": 3,
    "trainer.total_steps": 40, "trainer.test_freq": 8,
}  # fmt: skip
_NIM: dict[str, Any] = {
    "data.train_batch_size": 20, "rollout.n": 8, "rollout.validation.n": 16, "actor.mini_batch_size": 10,
    "actor.optim.lr": 1e-3, "actor.optim.betas": "[0.9, 0.95]", "actor.optim.warmup_steps": 5,
    "trainer.total_steps": 40, "trainer.test_freq": 10,
}  # fmt: skip


def _letters(algorithm: str, recipe: str, **keys: Any) -> GateTask:
    return GateTask(algorithm, "letters", recipe, "critic/score/mean", 0.8, {**_LETTERS, **_dotted(keys)})


def _arithmetic(algorithm: str, recipe: str, learned: float = 0.65, **keys: Any) -> GateTask:
    metric = VALIDATION.format(source="arithmetic")
    every = {**_ARITHMETIC, **_dotted(keys)}
    known = {key: value for key, value in every.items() if value is not None}  # None takes a key out
    return GateTask(algorithm, "arithmetic", recipe, metric, learned, known)


def _samples(recipe: str, problem: str, metric: str, learned: float, lr: float, steps: int) -> GateTask:
    keys = {"actor.optim.lr": lr, "trainer.total_steps": steps, "trainer.test_freq": steps // 8}
    return GateTask(recipe, problem, recipe, metric, learned, keys)


def _dotted(keys: Keys) -> dict[str, Any]:
    """Return ``keys`` with dots in the place of double underscores."""
    return {key.replace("__", "."): value for key, value in keys.items()}


TASKS: dict[str, GateTask] = {
    task.name: task
    for task in (
        _letters("grpo", "grpo"),
        _letters("ppo", "ppo", critic__optim__lr=3e-3, critic__warmup_steps=2),
        _letters(
            "prime",
            "prime",
            prm__optim__lr=3e-3,
            prm__right_above=0.12,
            rollout__n=8,
            algorithm__dynamic_sampling__filter="nonzero-spread",
        ),
        _arithmetic("grpo", "grpo"),
        _arithmetic("rloo", "grpo", algorithm__advantage="rloo"),
        _arithmetic("dapo", "dapo", algorithm__overlong="null"),
        _arithmetic("raft", "raft", algorithm__selection__selector="threshold", actor__old_logprobs="recompute"),
        _arithmetic("ppo", "ppo", critic__optim__lr=1e-3, rollout__n=8),
        _arithmetic(
            "distill",
            "distill",
            0.3,
            model__path="arithmetic/base",
            distill__teachers__best__model__path="arithmetic/model",
            distill__on_policy_fraction=0.5,
            actor__objective__divergence__kind="forward-kl",
            actor__optim__lr=3e-3,
            actor__mini_batch_size=None,
            actor__old_logprobs=None,
            rollout__n=1,
            trainer__total_steps=160,
            trainer__test_freq=20,
        ),
        _arithmetic(
            "online_dpo",
            "online_dpo",
            0.6,
            actor__old_logprobs=None,
            actor__optim__lr=2e-4,
            actor__objective__loss="{name: dpo, beta: 0.3}",
            trainer__total_steps=100,
            trainer__test_freq=10,
        ),
        GateTask(
            "ppo",
            "judged-letters",
            "ppo",
            "critic/score/mean",
            1.0,
            {**_LETTERS, "critic.optim.lr": 3e-3, "critic.warmup_steps": 2},
            margin=0.5,
        ),
        _samples("sft", "solutions", VALIDATION.format(source="arithmetic"), 0.6, 3e-3, 160),
        _samples("dpo", "comparisons", "val/rewards/accuracies", 0.85, 5e-4, 60),
        _samples("rm", "comparisons", "val/accuracy", 0.85, 1e-3, 120),
        GateTask("self_play", "nim", "self_play", "val-core/nim/reward/mean@16", 0.42, _NIM),
    )
}
FAST = ("grpo-letters", "ppo-letters")
"""The tasks that run in continuous integration."""


def find_tasks(names: Sequence[str]) -> list[GateTask]:
    """Return the tasks with these names, or all for none.

    Raises:
        ConfigError: there is no such task.
    """
    for name in names:
        if name not in TASKS:
            close = get_close_matches(name, TASKS, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(TASKS)}"
            raise ConfigError(f"the gate has no task {name!r}; {hint}")
    return [TASKS[name] for name in dict.fromkeys(names)] if names else list(TASKS.values())
