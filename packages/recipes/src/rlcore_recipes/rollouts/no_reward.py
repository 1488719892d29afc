"""`none`: the reward of runs that learn from something else."""

from __future__ import annotations

from rlcore.config import Config
from rlcore.engines import Reward, RewardResult, RewardSample, RewardSettings


class NoReward(Reward):
    """Scores every completion 0."""

    def __init__(self, options: Config, settings: RewardSettings) -> None:
        super().__init__()

    async def score(self, sample: RewardSample) -> RewardResult:
        """Return 0."""
        return RewardResult(0.0)
