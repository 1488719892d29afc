"""Scores that cannot be used cost the sample they belong to, and no other."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.controller import LocalExecutor
from rlcore.engines import ModelSettings, RewardResult
from rlcore_kit.testing.tiny_model import tiny_tokenizer
from rlcore_recipes.rollouts.reward_model import RewardModel
from rlcore_recipes.rollouts.scorer import checked
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.settings.roles import StepRewardSettings
from rlcore_recipes.step.advantages import rewards_of


def test_results_that_cannot_be_used_become_failed_ones(caplog: pytest.LogCaptureFixture) -> None:
    good = RewardResult(0.5, {"words": 3.0}, "x")
    bad = [
        *(RewardResult(score) for score in (math.nan, -math.inf, 1e39)),
        *(RewardResult(1.0, {name: 1.0}) for name in ("error_ratio", "", "two\nlines", "x" * 1000)),
        RewardResult(1.0, {"words": math.nan}),
        RewardResult(1.0, {str(number): 0.0 for number in range(20_000)}),
    ]
    assert checked([good, *bad, good], -1.0) == [good, *[RewardResult(-1.0, error="result")] * len(bad), good]
    assert "9 of 11 samples get error_score=-1, because the reward returned" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_reward_model_without_a_finite_score_fails_its_sample(value: float, caplog: pytest.LogCaptureFixture) -> None:
    engine = SimpleNamespace(offload=lambda: None)
    settings = SimpleNamespace(coeff=2.0, offload=True, steps=None, weights=None)
    model = RewardModel(engine, settings, -1.0, LocalExecutor(), Timings(), ModelSettings(path="x"))  # type: ignore[arg-type]
    results = [RewardResult(0.5), RewardResult(1.0, {"words": 2.0}), RewardResult(0.0, error="timeout")]
    batch = Batch({"score": torch.tensor([0.5, 1.0, 0.0]), "group": torch.tensor([7, 8, 9]), "reward_result": results})
    values = Batch({"values": Jagged(torch.tensor([9.0, 3.0, 9.0, value, value]), torch.tensor([2, 2, 1]))})
    scored = model.added(batch, values, batch)
    assert scored["score"].tolist() == [6.5, -1.0, -1.0]
    assert scored["reward_model_score"].tolist() == [3.0, 0.0, 0.0]
    assert scored["reward_result"] == [
        RewardResult(0.5),
        RewardResult(1.0, {"words": 2.0}, error="reward_model"),
        RewardResult(0.0, error="timeout"),
    ]
    assert "score of 2 of 3 samples is not finite; they get reward.error_score=-1 (prompts 8, 9)" in caplog.text


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return ModelSettings(path=str(folder))


TEXTS = (("qq", "ab\n\ncd<|end|>"), ("q", "e"), ("q", "\n\n"))
STEPS = (2, 1, 0)
"""Number of steps. A character is a token, but for <|end|>: the steps end at the tokens 5, 8 and 10 of the batch."""


def step_scores(policy: ModelSettings, combine: Any, sigmoid: bool = True, broken: int | None = None) -> Batch:
    """Score the completions of `TEXTS`, next to rewards of 1, by a model that gives 0.1, 0.2 … from token to token."""
    tokenizer = tiny_tokenizer()
    prompts, completions = ([tokenizer(text)["input_ids"] for text in texts] for texts in zip(*TEXTS))
    tokens = Jagged.from_list([torch.tensor(one + two) for one, two in zip(prompts, completions)])
    mask = [torch.tensor([0.0] * len(one) + [1.0] * len(two)) for one, two in zip(prompts, completions)]
    values = torch.arange(1, len(tokens.values) + 1) / 10
    if broken is not None:
        values[broken] = math.nan
    batch = Batch({"tokens": tokens, "loss_mask": Jagged.from_list(mask), "group": torch.arange(3)})
    batch = batch.with_columns(values=batch.jagged(values))
    steps = StepRewardSettings(combine=combine, sigmoid=sigmoid)
    settings: Any = SimpleNamespace(coeff=2.0, offload=False, steps=steps, weights=None)
    engine: Any = None
    model = RewardModel(engine, settings, -1.0, LocalExecutor(), Timings(), policy)
    results = [RewardResult(1.0)] * 3
    scores = Batch({"score": torch.ones(3), "reward_result": results})
    found = model.added(scores, batch.select("values"), batch)
    return batch.with_columns(**{name: found[name] for name in found.names})


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("sum", 0.6 + 0.9), ("mean", 0.75), ("min", 0.6), ("product", 0.6 * 0.9), ("last", 0.9), ("tokens", 0.6 + 0.9)],
)
def test_the_scores_of_steps_are_combined(policy: ModelSettings, combine: str, expected: float) -> None:
    batch = step_scores(policy, combine, sigmoid=False)
    assert batch["steps"].tolist() == list(STEPS)
    assert batch["reward_model_score"].tolist() == pytest.approx([expected, 1.1, 0.0])
    assert batch["score"].tolist() == pytest.approx([1 + 2 * expected, 1 + 2 * 1.1, 1.0])


def test_rewards_of_steps_are_on_their_last_tokens(policy: ModelSettings) -> None:
    batch = step_scores(policy, "tokens")
    assert batch["step_rewards"].values.nonzero().flatten().tolist() == [5, 8, 10]
    sigmoids = [1 / (1 + math.exp(-value)) for value in (0.6, 0.9, 1.1)]
    assert batch.flat("step_rewards")[[5, 8, 10]].tolist() == pytest.approx([2 * value for value in sigmoids])
    rewards = rewards_of(batch, batch["score"])
    expected = torch.zeros(len(rewards))
    expected[[5, 8, 10]] = torch.tensor([2 * value for value in sigmoids])
    for last in (8, 10, 13):
        expected[last] += 1  # the reward of the completion, in addition to that of its last step
    torch.testing.assert_close(rewards, expected)


def test_a_step_without_a_finite_score_fails_its_sample(policy: ModelSettings) -> None:
    batch = step_scores(policy, "tokens", broken=5)
    assert batch["score"].tolist() == pytest.approx([-1.0, 1 + 2 / (1 + math.exp(-1.1)), 1.0])
    assert [result.error for result in batch["reward_result"]] == ["reward_model", None, None]
    assert batch["step_rewards"].values.nonzero().flatten().tolist() == [10]
    assert rewards_of(batch, batch["score"])[8] == -1


@pytest.mark.parametrize("combine", [None, "sum", "tokens"])
def test_a_trajectory_of_two_rows_has_one_score_of_the_reward_model(policy: ModelSettings, combine: Any) -> None:
    """The second row shares four tokens; its steps come after those of the first one."""
    ids = tiny_tokenizer()("qab\n\ncd\n\ne")["input_ids"]
    rows = [torch.tensor(ids[:5]), torch.tensor(ids[:4] + ids[5:])]
    columns = {
        "tokens": Jagged.from_list(rows),
        "loss_mask": Jagged.from_list([[0.0, 1, 1, 1, 1], [0.0] * 4 + [1.0] * (len(rows[1]) - 4)]),
        "values": Jagged.from_list([torch.full((len(row),), 0.25) for row in rows]),
        "step_rewards": Jagged.from_list([[0, 0, 8.0, 0, 0], [0.0] * len(rows[1])]),
    }
    shared = {"trajectory": torch.tensor([5, 5]), "shared_prefix": torch.tensor([0, 4]), "group": torch.tensor([0, 0])}
    batch = Batch({**columns, **shared})
    steps = None if combine is None else StepRewardSettings(combine=combine, sigmoid=False)
    settings: Any = SimpleNamespace(coeff=1.0, offload=False, steps=steps, weights=None)
    engine: Any = None
    model = RewardModel(engine, settings, -1.0, LocalExecutor(), Timings(), policy)
    scores = Batch({"score": torch.ones(2), "reward_result": [RewardResult(1.0)] * 2})
    found = model.added(scores, batch.select("values"), batch)
    score = 0.25 if combine is None else 0.25 * 3  # ab, cd and e
    assert found["reward_model_score"].tolist() == [score] * 2
    assert found["score"].tolist() == [1 + score] * 2
    if combine == "tokens":
        assert float(found.flat("step_rewards").sum()) == 8 + 0.75
