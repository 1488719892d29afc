"""`math`: mathematical equality by math-verify, in the pool. `rlcore_rewards.math_answers` is the workers' side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from rlcore.config import Config, Package
from rlcore.engines.settings import RewardSettings
from rlcore.errors import PluginError
from rlcore_kit.worker.process import WorkerFailure
from rlcore_rewards.pool import PooledReward


class MathOptions(Config):
    """Options of `math`."""

    needs_ground_truth: ClassVar[bool] = True

    extraction: Literal["boxed", "any"] = Field(
        "any",
        description=r"'boxed': the content of the last \boxed{}; 'any': that or, without one, the last expression.",
    )
    max_chars: int = Field(
        20_000, gt=0, description="Number of characters at the end of a completion that are searched for the answer."
    )
    format_score: float = Field(
        0.0, description="Score of a wrong answer in the right format; a right answer scores 1."
    )

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("math_verify", "rlcore-rewards")


def math_reward(options: MathOptions, settings: RewardSettings) -> PooledReward:
    """Make the reward that scores an equal expression 1, another expression ``format_score`` and none 0.

    Extras: ``correct`` and ``answered``, each 0 or 1.

    Raises:
        PluginError: math-verify cannot be imported.
    """
    try:
        return PooledReward("math", "rlcore_rewards.math_answers:load", options.model_dump(), settings)
    except WorkerFailure as failure:
        raise PluginError(f"reward 'math' cannot start: {failure}; reinstall rlcore-rewards") from None
