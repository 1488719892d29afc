"""What a step's batch looks like in numbers."""

from __future__ import annotations

import torch

from rlcore.algorithms.filters import nonzero_spread
from rlcore.batch import Batch
from rlcore.registry import NoParams


def batch_metrics(batch: Batch) -> dict[str, float]:
    """Scores, rewards, advantages, returns, values and lengths, under the names that people know."""
    mask = batch.flat("loss_mask").bool()
    found = spread("critic/score", batch["score"])
    found |= spread("critic/rewards", sequence_sums(batch, "token_rewards"))
    for column in ("advantages", "returns", "values"):
        if column in batch:
            found |= spread(f"critic/{column}", batch.flat(column)[mask])
    if "returns" in batch and "values" in batch:
        found |= explained_variance(batch.flat("values")[mask], batch.flat("returns")[mask])
    found |= spread("response_length", batch["response_length"])
    found |= spread("prompt_length", batch["prompt_length"])
    reasons = batch["finish_reason"]
    found["response_length/clip_ratio"] = reasons.count("length") / max(len(reasons), 1)
    found["response/aborted_ratio"] = reasons.count("abort") / max(len(reasons), 1)
    found["perf/total_num_tokens"] = float(batch.total_tokens)
    return found | reward_metrics(batch)


def reward_metrics(batch: Batch) -> dict[str, float]:
    """Means of the rewards' extra numbers, the shares of failed rewards and of groups of equal scores."""
    results = batch["reward_result"]
    found = {"reward/error_ratio": sum(result.error is not None for result in results) / max(len(results), 1)}
    for name in sorted({name for result in results for name in result.extras}):
        values = [result.extras[name] for result in results if name in result.extras]
        found[f"reward/{name}"] = sum(values) / len(values)
    differs = nonzero_spread(batch["score"], batch["group"], NoParams())  # per sample; groups are of one size
    return found | {"reward/equal_score_groups": 1 - float(differs.float().mean())}


def sequence_sums(batch: Batch, column: str) -> torch.Tensor:
    """``[B]``: the sum of a per-token column over each sample."""
    sample = torch.arange(len(batch)).repeat_interleave(batch.lengths)
    return torch.zeros(len(batch)).index_add(0, sample, batch.flat(column).float())


def spread(name: str, values: torch.Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    values = values.float()
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> dict[str, float]:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that knows only the mean."""
    variance = returns.var(correction=0)
    if not len(returns) or not float(variance):
        return {}
    return {"critic/vf_explained_var": float(1 - (returns - values).var(correction=0) / variance)}
