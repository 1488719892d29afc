"""Estimators, losses and recipes of one's own: declared columns arrive, units stay whole, validation is not guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.algorithms import Advantages, PolicyLossInputs, advantages, policy_losses
from rlcore.algorithms.sequences import per_token, sequence_sums, trained_mask
from rlcore.batch import Batch
from rlcore.config import load_config
from rlcore.config.registry import NoParams
from rlcore.errors import ConfigError
from rlcore.metrics import Metrics
from rlcore.plugins import import_algorithms
from rlcore_recipes import grpo
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.settings.columns import ON_DEMAND, SAMPLED, SCORED, SHAPED

EVERYTHING = SAMPLED | SCORED | ON_DEMAND | SHAPED


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """An estimator that reads every column there is, and a loss over the pairs of neighbours in a group."""
    import_algorithms()  # those of installed packages stay registered
    for registry in (advantages, policy_losses):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    seen: list[set[str]] = []

    @advantages.register("reader", required_columns=EVERYTHING)
    def reader(batch: Batch, params: NoParams) -> Advantages:
        seen.append(set(batch.names))
        assert all(result.score == score for result, score in zip(batch["reward_result"], batch["score"].tolist()))
        assert {extra["difficulty"] for extra in batch["extra"]} == {3}
        mask = trained_mask(batch)
        assert bool((batch.flat("entropy")[mask] > 0).all())
        scores = batch["score"] - batch["baseline_score"]
        return Advantages(torch.where(mask, per_token(scores, batch.lengths), 0))

    @policy_losses.register("pairs", required_columns={"extra", "score"}, together="group")
    def pairs(inputs: PolicyLossInputs, params: NoParams) -> tuple[torch.Tensor, Metrics]:
        """The margin between neighbours, on the last token of the first."""
        counts = inputs.columns["group"].unique(return_counts=True)[1]
        assert len(inputs.columns["extra"]) == len(inputs.lengths)
        sums = sequence_sums(inputs.logprobs, inputs.lengths).reshape(-1, 2)
        margin = -torch.nn.functional.logsigmoid((sums[:, 0] - sums[:, 1]) / 10)
        first = torch.arange(len(inputs.lengths)) % 2 == 0
        last = inputs.lengths.cumsum(0) - 1
        losses = torch.zeros_like(inputs.logprobs).index_put((last[first],), margin)
        metrics = Metrics()
        metrics.max("odd_groups", float((counts % 2).max()))
        return losses * inputs.mask, metrics

    return seen


def test_declared_columns_arrive_and_units_stay_whole(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, registered: list[set[str]]
) -> None:
    """With budgets of many groups and of less than one, the loss over pairs trains the same."""
    changes = {
        "data.train_files": task.write("extras.jsonl", 8, difficulty=3),
        "algorithm.advantage": "reader",
        "actor.objective.policy_loss": "pairs",
        "actor.objective.aggregation": "seq-mean-token-sum",
        "actor.mini_batch_size": 4,
        "trainer.total_steps": 1,
    }
    norms = []
    for budget in (4096, 1):
        out_dir = tmp_path / str(budget)
        keys = {**changes, "actor.max_tokens_per_micro_batch": budget}
        result = task.run("grpo", out_dir, keys)
        assert result.exit_code == 0, result.output
        (line,) = metrics_of(out_dir)
        assert line["actor/odd_groups"] == 0
        norms.append((line["actor/grad_norm"], line["actor/pg_loss"]))
    assert norms[0][0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert all(columns >= EVERYTHING for columns in registered)


def test_a_column_that_no_recipe_makes_is_refused_before_training(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advantages.register("wants", required_columns={"turn_rewards"})(lambda batch, params: None)
    policy_losses.register("wants", required_columns={"returns"})(lambda inputs, params: None)
    changes = {"algorithm.advantage": "wants", "actor.objective.policy_loss": "wants"}
    result = task.run("grpo", tmp_path / "run", changes)
    assert result.exit_code != 0
    assert "algorithm.advantage" in result.output
    assert "wants needs the column 'turn_rewards', which this recipe does not make" in result.output
    assert "wants needs the column 'returns'" in result.output
    assert not (tmp_path / "run").exists()
    # a recipe that says that its step makes it is not stopped; where the step does not, the estimator's call is
    monkeypatch.setattr(grpo.GRPOConfig, "own_columns", frozenset({"turn_rewards"}))
    result = task.run("grpo", tmp_path / "run", {"algorithm.advantage": "wants"})
    assert "the advantage estimator 'wants' needs the column 'turn_rewards', which is not in the batch" in result.output


def test_a_recipe_that_does_not_say_how_it_is_validated_is_not(task: Any, tmp_path: Path) -> None:
    """It could sample several turns; single completions would measure something else than it trains."""
    arguments = task.arguments("grpo", tmp_path / "run", {"trainer.test_freq": 1, "model.path": "nowhere"})[2:]
    config = load_config(grpo.GRPOConfig, None, arguments)
    reason = r"trainer.test_freq=1 asks for validation, and the recipe does not say"
    with pytest.raises(ConfigError, match=reason):
        train_rl("grpo", config, grpo.step)
