"""The reward ``game``: the outcome of a game, which its episode knows."""

from __future__ import annotations

from rlcore.config.registry import NoParams
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore.errors import ConfigError


class GameReward(Reward):
    """1 for a game won, 0.5 for a draw, 0 for a loss; the score of the first player in self-play."""

    def __init__(self, options: NoParams, settings: RewardSettings) -> None:
        pass

    async def score(self, sample: RewardSample) -> RewardResult:
        """Return the outcome, with the number of turns, and whether an illegal move or lack of room ended the game."""
        outcome = sample.extra.get("outcome")
        if outcome is None:
            raise ConfigError("reward.name=game scores games: use the recipe self_play, or another reward")
        numbers = {name: float(outcome[name]) for name in ("turns", "illegal", "unfinished")}
        return RewardResult(outcome["score"], numbers)
