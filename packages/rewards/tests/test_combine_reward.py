from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.engines.reward import Reward, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_kit.testing.reward import RewardConformance
from rlcore_rewards.combine import CombinedReward, CombineOptions

PARTS = {
    "rewards": [{"name": "gsm8k"}, {"name": "gsm8k", "label": "read", "gsm8k": {"method": "flexible"}, "weight": 0.5}]
}


class TestCombineConformance(RewardConformance):
    def make(self) -> Reward:
        return plugins.get("rlcore.rewards", "combine").build(CombineOptions.model_validate(PARTS), RewardSettings())

    def cases(self) -> list[tuple[RewardSample, float]]:
        samples = [RewardSample([], completion, "18") for completion in ("#### 18", "it is 18", "it is 19")]
        return list(zip(samples, [1.5, 0.5, 0.0]))


def test_reports_every_part() -> None:
    reward = CombinedReward(CombineOptions.model_validate(PARTS), RewardSettings())
    [result] = reward.score_batch([RewardSample([], "it is 18", "18")])
    assert result.extras == {
        "gsm8k/score": 0.0,
        "gsm8k/correct": 0.0,
        "gsm8k/answered": 0.0,
        "read/score": 1.0,
        "read/correct": 1.0,
        "read/answered": 1.0,
    }
    assert result.answer == "18"


def test_a_failing_part_costs_its_share(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def boom(sample): raise ValueError('boom')\n")
    options = {"rewards": [{"name": "gsm8k"}, {"name": "function", "weight": 3, "function": {"path": f"{file}:boom"}}]}
    reward = CombinedReward(CombineOptions.model_validate(options), RewardSettings(error_score=-1))
    [result] = reward.score_batch([RewardSample([], "#### 18", "18")])
    assert (result.score, result.error) == (1 - 3, "exception")
    assert reward.stats() == {"samples": 2, "errors": 1, "errors/exception": 1}
    reward.close()


def test_a_part_that_is_not_applicable_contributes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text("def f(completions, task, **kwargs): return [2.0 if name == 'code' else None for name in task]\n")
    options = {"rewards": [{"name": "gsm8k"}, {"name": "function", "weight": 3, "function": {"path": f"{file}:f"}}]}
    reward = CombinedReward(CombineOptions.model_validate(options), RewardSettings(workers=1))
    code, math = reward.score_batch([RewardSample([], "#### 18", "18", extra={"task": task}) for task in ("code", "m")])
    assert (code.score, code.extras["function/score"]) == (7.0, 2.0)
    assert (math.score, math.applicable, math.error) == (1.0, True, None)
    assert "function/score" not in math.extras, "the mean of its scores is over samples to which it applies"
    reward.close()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "at least 1"),
        ([{"name": "gsm8k"}, {"name": "gsm8k"}], "several rewards have the label 'gsm8k'"),
        ([{"name": "gsm8"}], "did you mean 'gsm8k'"),
        ([{"name": "gsm8k", "gsm8k": {"methud": "strict"}}], "methud"),
        ([{"name": "gsm8k", "weight": float("nan")}], "finite"),
        ([{"name": "function"}], "path"),
    ],
)
def test_bad_options_are_refused_when_they_are_read(rewards: list[object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CombineOptions.model_validate({"rewards": rewards})
