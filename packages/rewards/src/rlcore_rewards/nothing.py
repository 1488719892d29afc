"""`none`: no reward, where a reward model alone scores completions."""

from __future__ import annotations

from rlcore.config import Config
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings


class NoRewardOptions(Config):
    """`none` has no options."""


class NoReward(Reward):
    """Scores every sample 0."""

    def __init__(self, options: NoRewardOptions, settings: RewardSettings) -> None:
        return

    async def score(self, sample: RewardSample) -> RewardResult:
        """Return 0."""
        return RewardResult(0.0)
