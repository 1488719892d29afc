"""The reward ``environment``: the score that an episode itself gives."""

from __future__ import annotations

from rlcore.config.registry import NoParams
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings


class EnvironmentReward(Reward):
    """The score of the episode; 0 from an episode that rewards its turns alone, as those rewards are added."""

    def __init__(self, options: NoParams, settings: RewardSettings) -> None:
        pass

    async def score(self, sample: RewardSample) -> RewardResult:
        """Return the score of the episode."""
        return RewardResult(sample.episode_score or 0.0)
