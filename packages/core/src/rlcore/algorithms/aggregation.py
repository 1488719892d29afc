"""Loss aggregation: from per-token losses to one scalar, normalised over the whole mini-batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from rlcore.algorithms.registries import aggregations
from rlcore.algorithms.sequences import sequence_means, trained_counts, trained_mask
from rlcore.batch import Batch
from rlcore.config import Config
from rlcore.config.registry import NoParams

TRAJECTORY_TOKENS = "trajectory_tokens"
"""A dense column of trajectories with several rows: the trained tokens of the row's trajectory. Such rows are one
sequence to an aggregation."""


def denominators(batch: Batch) -> dict[str, float]:
    """Return the sums that normalise every aggregation: trained tokens, and sequences that hold at least one."""
    counts = trained_counts(trained_mask(batch), batch.lengths)
    sequences = float((counts > 0).sum())
    if TRAJECTORY_TOKENS in batch:
        sequences = float(row_shares(batch, counts).sum())
    return {"tokens": float(counts.sum()), "sequences": sequences}


def row_shares(batch: Batch, counts: torch.Tensor) -> torch.Tensor:
    """Return the share of each row in the trained tokens of its trajectory, ``[B]`` fp64: they add up to 1 in each.

    Args:
        counts: ``[B]``, trained tokens of each row.
    """
    tokens: torch.Tensor = batch[TRAJECTORY_TOKENS]
    return counts.double() / tokens.cpu().clamp(min=1)


class ConstantLengthParams(Config):
    """Parameters of ``seq-mean-token-sum-norm``."""

    max_length: int = Field(gt=0, description="Constant every sequence's sum is divided by: the response budget.")


@aggregations.register("token-mean")
def token_mean(
    losses: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, denominators: Mapping[str, float], params: NoParams
) -> torch.Tensor:
    """Σ over all tokens / number of tokens: every token weighs the same.

    Source: DAPO, Yu et al. 2025, arXiv:2503.14476 (§3.3).
    """
    return _total(losses, mask) / max(denominators["tokens"], 1.0)


@aggregations.register("seq-mean-token-sum")
def seq_mean_token_sum(
    losses: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, denominators: Mapping[str, float], params: NoParams
) -> torch.Tensor:
    """Sum within each sequence, mean over sequences: the plain policy gradient.

    Source: Williams 1992, "Simple statistical gradient-following algorithms", Machine Learning 8.
    """
    return _total(losses, mask) / max(denominators["sequences"], 1.0)


@aggregations.register("seq-mean-token-mean", traits={"mean_per_sequence"})
def seq_mean_token_mean(
    losses: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor, denominators: Mapping[str, float], params: NoParams
) -> torch.Tensor:
    """Mean within each sequence, mean over sequences: every sequence weighs the same.

    Source: GRPO, Shao et al. 2024, arXiv:2402.03300 (eq. 3).
    """
    return sequence_means(losses, mask, lengths).sum() / max(denominators["sequences"], 1.0)


@aggregations.register("seq-mean-token-sum-norm", params=ConstantLengthParams)
def seq_mean_token_sum_norm(
    losses: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    denominators: Mapping[str, float],
    params: ConstantLengthParams,
) -> torch.Tensor:
    """Sum within each sequence / a constant length, mean over sequences: no bias towards short or long answers.

    Source: Dr. GRPO, Liu et al. 2025, arXiv:2503.20783.
    """
    return _total(losses, mask) / (max(denominators["sequences"], 1.0) * params.max_length)


def _total(losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), losses, 0).sum()
