"""How the values of a step's batch are distributed."""

from __future__ import annotations

import torch

from rlcore.batch import Batch
from rlcore_recipes.rollouts.trees import longest_rows, scored_rows
from rlcore_recipes.run.records import Histogram

BINS = 64


def batch_histograms(batch: Batch) -> dict[str, Histogram]:
    """Return histograms of lengths, scores and advantages, and of the ratios of probabilities.

    ``rollout/ratio`` is the probability of a trained token under the policy before the update, computed by the training
    engine, over that under the engine that sampled it: 1 where both agree. Only batches with both have it.
    """
    mask = batch.flat("loss_mask").bool()
    episodes = scored_rows(batch)
    values = {
        "response_length": longest_rows(batch)[episodes],
        "prompt_length": batch["prompt_length"][episodes],
        "critic/score": batch["score"][episodes],
        "critic/advantages": batch.flat("advantages")[mask],
    }
    if "old_logprobs" in batch and "rollout_logprobs" in batch:
        values["rollout/ratio"] = (batch.flat("old_logprobs") - batch.flat("rollout_logprobs"))[mask].float().exp()
    found = {name: histogram(column) for name, column in values.items()}
    return {name: one for name, one in found.items() if one is not None}


def histogram(values: torch.Tensor) -> Histogram | None:
    """Return `BINS` bins of equal width from the smallest value to the largest; None if no value is finite."""
    values = values.float()
    values = values[values.isfinite()]
    if not len(values):
        return None
    low, high = (float(bound) for bound in values.aminmax())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, BINS, low, high)
    return Histogram(tuple(torch.linspace(low, high, BINS + 1).tolist()), tuple(counts.long().tolist()))
