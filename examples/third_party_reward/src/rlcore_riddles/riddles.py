"""The reward: 1 if the last word of a completion is the ground truth, less for long-winded ones."""

import re

from pydantic import Field

from rlcore.config import Config
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings


class RiddlesOptions(Config):
    """The section ``reward.riddles`` of a configuration."""

    max_words: int = Field(50, ge=1, description="A right answer with more words scores half.")


class RiddlesReward(Reward):
    """Quick and harmless, so it runs in the trainer; for what is not, there is `rlcore_rewards.pool.PooledReward`."""

    def __init__(self, options: RiddlesOptions, settings: RewardSettings) -> None:
        self.options = options

    async def score(self, sample: RewardSample) -> RewardResult:
        words = re.findall(r"\w+", sample.completion.lower())
        answer = words[-1] if words else None
        right = answer == str(sample.ground_truth).lower()
        brief = len(words) <= self.options.max_words
        return RewardResult((1.0 if brief else 0.5) * right, {"words": float(len(words))}, answer)
