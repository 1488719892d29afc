"""The worker groups that take part in rolling samples out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlcore.controller import Executor
from rlcore.engines import RolloutEngine
from rlcore_recipes.rollouts.reward_model import RewardModel
from rlcore_recipes.run.timing import Timings


@dataclass(frozen=True)
class RolloutWorkers:
    """The executor and worker groups that roll samples out.

    Attributes:
        rollout: runs episodes.
        reward: scores their trajectories (`Scorer`).
        reward_model: adds its scores; None without one.
        free_memory: whether the rollout engine gives its memory back when it does not generate.
    """

    executor: Executor
    rollout: RolloutEngine
    reward: Any
    reward_model: RewardModel | None
    timed: Timings
    free_memory: bool

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Let the rollout engine hold its memory in the block, and the full weights if it shares those of a trainer.

        Weights that are sharded over several ranks are gathered and released by all of them together.
        """
        holds = self.free_memory or (self.rollout.shares_weights and self.rollout.dp_size > 1)
        if holds:
            self.rollout.wake()
        yield
        if holds:
            self.rollout.sleep()
