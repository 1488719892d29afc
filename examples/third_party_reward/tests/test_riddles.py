"""The contract of rewards, checked by the kit that rlcore brings (``pip install 'rlcore[testing]'``)."""

from collections.abc import Sequence

from rlcore.engines.reward import Reward, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_kit.testing.reward import RewardConformance
from rlcore_riddles.riddles import RiddlesOptions, RiddlesReward


class TestRiddles(RewardConformance):
    def make(self) -> Reward:
        return RiddlesReward(RiddlesOptions(max_words=3), RewardSettings())

    def cases(self) -> Sequence[tuple[RewardSample, float]]:
        return [
            (RewardSample([], "An echo.", "echo"), 1.0),
            (RewardSample([], "It must be an echo", "echo"), 0.5),
            (RewardSample([], "A mirror", "echo"), 0.0),
        ]
