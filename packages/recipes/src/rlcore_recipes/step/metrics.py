"""Metrics of a step's batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlcore.algorithms.filters import nonzero_spread
from rlcore.algorithms.value_loss import explained_variance
from rlcore.batch import Batch
from rlcore.config.registry import NoParams
from rlcore.engines import RewardResult
from rlcore_recipes.rollouts.scorer import INVALID
from rlcore_recipes.rollouts.trees import (
    first_rows,
    longest_rows,
    one_per_trajectory,
    trajectory_index,
    trajectory_sums,
)
from rlcore_recipes.run.records import Histogram, Table
from rlcore_recipes.run.session import Session
from rlcore_recipes.step.episodes import INVALID_RATIO, episode_metrics
from rlcore_recipes.step.histograms import batch_histograms
from rlcore_recipes.step.logged_rows import table_of, with_prompts
from rlcore_recipes.trackers import show_histograms


def step_metrics(session: Session[Any], batch: Batch, number: int) -> dict[str, float]:
    """Return the `batch_metrics` of the batch that step ``number`` trained on; record histograms and rollouts of it."""
    trainer = session.config.trainer
    metrics, histograms, table, invalid = session.executor.compute(
        described, batch, number - 1, show_histograms(trainer.trackers), trainer.log_rollouts
    )
    session.records.histograms |= histograms
    if table.rows:
        session.records.tables["rollouts"] = with_prompts(table, session.tokenizer)
    for reason in invalid:
        session.records.invalid.add(reason)
    if invalid:
        session.warn_once(
            INVALID_RATIO,
            f"{metrics[INVALID_RATIO]:.0%} of the episodes of a step are invalid, the first one because "
            f"{invalid[0]}. {INVALID_RATIO} has the share of every step",
        )
    return metrics


def described(
    batch: Batch, version: int, histograms: bool, logged: int
) -> tuple[dict[str, float], dict[str, Histogram], Table, list[str]]:
    """Return the metrics of ``batch``, `batch_histograms` if they are asked for, the table of its first ``logged``
    trajectories (-1: of all), and why some are invalid."""
    first = first_rows(batch).nonzero().flatten().tolist()
    return (
        batch_metrics(batch, version),
        batch_histograms(batch) if histograms else {},
        table_of(batch, first if logged == -1 else first[:logged]),
        [batch["invalid"][row] for row in first if batch["invalid"][row]] if "invalid" in batch else [],
    )


def batch_metrics(batch: Batch, version: int | None = None) -> dict[str, float]:
    """Return statistics of scores, rewards, advantages, returns, values and lengths, and staleness.

    Scores, rewards and lengths are those of valid trajectories; the length of one is that of its longest row.

    Args:
        version: of the policy that the batch is about to train; None leaves out how far behind it the samples are.
    """
    found = token_metrics(batch) | episode_metrics(batch) | staleness(batch, version)
    rewards = trajectory_sums(batch, batch.flat("token_rewards"))[trajectory_index(batch)]
    episodes = one_per_trajectory(batch.with_columns(rewards=rewards, response_length=longest_rows(batch)))
    found |= spread("critic/score", episodes["score"])
    if "reward_model_score" in episodes:
        found |= spread("reward_model/score", episodes["reward_model_score"])
    if "steps" in episodes:
        found |= spread("reward_model/steps", episodes["steps"])
    found |= spread("critic/rewards", episodes["rewards"])
    found |= spread("response_length", episodes["response_length"])
    found |= spread("prompt_length", episodes["prompt_length"])
    reasons = episodes["finish_reason"]
    found["response_length/clip_ratio"] = reasons.count("length") / max(len(reasons), 1)
    found["response/aborted_ratio"] = reasons.count("abort") / max(len(reasons), 1)
    return found | reward_metrics(episodes)


def token_metrics(batch: Batch) -> dict[str, float]:
    """Return statistics of the trained tokens' advantages, returns and values, and the number of all tokens."""
    mask = batch.flat("loss_mask").bool()
    found = {"perf/total_num_tokens": float(batch.total_tokens)}
    for column in ("advantages", "returns", "values"):
        if column in batch:
            found |= spread(f"critic/{column}", batch.flat(column)[mask])
    if "returns" in batch and "values" in batch:
        found["critic/vf_explained_var"] = explained_variance(batch)
    return found


def staleness(batch: Batch, version: int | None) -> dict[str, float]:
    """Return how many versions the samples' oldest tokens lag behind, and the share of tokens of later versions."""
    found = {}
    if version is not None and len(batch):
        behind = version - batch["policy_version"]
        found["rollout/staleness_mean"] = float(behind.double().mean())
        found["rollout/staleness_max"] = float(behind.max())
    made = float(batch["response_length"].sum())
    return found | {"rollout/later_version_ratio": float(batch["later_version_tokens"].sum()) / max(made, 1.0)}


def reward_metrics(batch: Batch) -> dict[str, float]:
    """Return the means of the rewards' extra numbers, the shares of failed rewards and of groups of equal scores."""
    results = batch["reward_result"]
    found = {"reward/error_ratio": failed_ratio(results)}
    for name in sorted({name for result in results for name in result.extras}):
        values = [result.extras[name] for result in results if name in result.extras]
        found[f"reward/{name}"] = sum(values) / len(values)
    if len(batch):
        differs = nonzero_spread(batch["score"], batch["group"], NoParams())  # per sample; groups are of one size
        found["reward/equal_score_groups"] = 1 - float(differs.float().mean())
    return found


def failed_ratio(results: Sequence[RewardResult]) -> float:
    """Return the share of results of a reward that failed; it was not asked about invalid episodes."""
    asked = [result for result in results if result.error != INVALID.error]
    return sum(result.error is not None for result in asked) / max(len(asked), 1)


def spread(name: str, values: torch.Tensor) -> dict[str, float]:
    """Return mean, maximum and minimum of ``values``."""
    if not len(values):
        return {}
    values = values.float()
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }
