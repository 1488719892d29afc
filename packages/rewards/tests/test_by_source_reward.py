from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.engines.reward import Reward, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_kit.testing.reward import RewardConformance
from rlcore_rewards.by_source import BySourceOptions, BySourceReward

TWO: dict[str, Any] = {
    "rewards": {"openai/gsm8k": {"name": "gsm8k"}, "my_*": {"name": "gsm8k", "weight": 2, "offset": -1}}
}


def sample(source: str, completion: str) -> RewardSample:
    return RewardSample([], completion, "18", source)


class TestBySourceConformance(RewardConformance):
    def make(self) -> Reward:
        options = BySourceOptions.model_validate(TWO)
        reward: Reward = plugins.get("rlcore.rewards", "data_source").build(options, RewardSettings())
        return reward

    def cases(self) -> list[tuple[RewardSample, float]]:
        return [
            (sample("openai/gsm8k", "#### 18"), 1.0),
            (sample("openai/gsm8k", "#### 19"), 0.0),
            (sample("my_numbers", "#### 18"), 1.0),
            (sample("my_numbers", "#### 19"), -1.0),
        ]


def test_an_unknown_data_source_fails_the_sample_and_names_the_known_ones(caplog: pytest.LogCaptureFixture) -> None:
    reward = BySourceReward(BySourceOptions(), RewardSettings(error_score=-5))
    results = reward.score_batch([sample("riddles", "#### 18"), sample("openai/gsm8k", "#### 18")])
    assert [(result.score, result.error) for result in results] == [(-5, "data_source"), (1, None)]
    assert reward.stats() == {"samples": 2, "errors": 1, "errors/data_source": 1}
    assert "'riddles'" in caplog.text
    assert "openai/gsm8k" in caplog.text
    reward.close()


def test_mathematics_is_scored_as_verl_scores_it() -> None:
    """MATH: only a boxed answer, 0 or 1. AIME and DAPO's set: -1 or 1."""
    reward = BySourceReward(BySourceOptions(), RewardSettings(workers=1))
    boxed, plain = r"so \boxed{18}", "so it is 18"
    cases = [
        ("lighteval/MATH", boxed, 1),
        ("lighteval/MATH", plain, 0),
        ("aime2024", boxed, 1),
        ("math_dapo", "no", -1),
    ]
    results = reward.score_batch([sample(source, completion) for source, completion, _ in cases])
    assert [result.score for result in results] == [score for _, _, score in cases]
    reward.close()


def test_a_mistaken_reward_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ValidationError, match="gsm9k"):
        BySourceOptions.model_validate({"rewards": {"x": {"name": "gsm9k"}}})
