"""Metrics of the episodes of an environment."""

from __future__ import annotations

from statistics import fmean

from rlcore.batch import Batch
from rlcore_recipes.rollouts.trees import first_rows

INVALID_RATIO = "rollout/invalid_ratio"


def episode_metrics(batch: Batch) -> dict[str, float]:
    """Return the number of invalid episodes and their share, the mean number of rows of a trajectory, the share of
    tokens that an earlier row has, and the means of the numbers that episodes give. Nothing without an environment."""
    if "trajectory" not in batch:
        return {}
    first = first_rows(batch).nonzero().flatten().tolist()
    invalid = sum(bool(batch["invalid"][row]) for row in first)
    given = [batch["episode_metrics"][row] for row in first]
    found = {
        "rollout/invalid_episodes": float(invalid),
        INVALID_RATIO: invalid / max(len(first), 1),
        "rollout/rows_per_episode": len(batch) / max(len(first), 1),
        "rollout/shared_token_ratio": float(batch["shared_prefix"].sum()) / max(batch.total_tokens, 1),
    }
    for name in sorted({name for metrics in given for name in metrics}):
        found[f"rollout/{name}"] = fmean(metrics[name] for metrics in given if name in metrics)
    return found
