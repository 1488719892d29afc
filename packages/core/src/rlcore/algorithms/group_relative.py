"""Advantages of whole answers, relative to the other answers to the same prompt.

s is a sample's score, the sum of its token rewards; μ and σ (unbiased) are taken over its group, n samples of one
prompt. Every trained token gets its sample's advantage. Groups of equal scores get exactly 0, whatever the rounding; so
does a sample that is alone in its group, as its own score is no baseline. Where advantages are normalised over the
batch afterwards, they get what that makes of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field

from rlcore.algorithms.registries import Advantages, advantages
from rlcore.algorithms.sequences import per_token, sequence_sums, trained_counts, trained_mask, whiten
from rlcore.batch import Batch
from rlcore.config import Config
from rlcore.config.registry import NoParams


class GRPOParams(Config):
    """Parameters of ``grpo``."""

    normalize_std: bool = Field(True, description="Divide by the group's σ; false is Dr. GRPO.")
    epsilon: float = Field(1e-6, gt=0, description="Added to σ.")


@advantages.register("grpo", params=GRPOParams, traits={"compares_group"})
def grpo(batch: Batch, params: GRPOParams) -> Advantages:
    """(s − μ) / (σ + ε), or s − μ without ``normalize_std``.

    Source: GRPO, Shao et al. 2024, arXiv:2402.03300; without σ: Dr. GRPO, Liu et al. 2025, arXiv:2503.20783.
    """
    groups = _groups(batch)
    deviation = groups.deviation
    return _spread(deviation / (groups.std + params.epsilon) if params.normalize_std else deviation, batch)


@advantages.register("rloo", traits={"compares_group"})
def rloo(batch: Batch, params: NoParams) -> Advantages:
    """n/(n − 1) · (s − μ), which is s minus the mean of the *other* scores.

    Source: RLOO, Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline
    for free!".
    """
    groups = _groups(batch)
    return _spread(groups.deviation * groups.count / (groups.count - 1).clamp(min=1), batch)


@advantages.register("reinforce_plus_plus_baseline", traits={"compares_group"})
def reinforce_plus_plus_baseline(batch: Batch, params: NoParams) -> Advantages:
    """whiten(s − μ): the group's mean as baseline, normalised over all trained tokens of the batch.

    Source: REINFORCE++, Hu et al. 2025, arXiv:2501.03262.
    """
    mask = trained_mask(batch)
    result = _spread(_groups(batch).deviation, batch).advantages
    result[mask] = whiten(result[mask])
    return Advantages(result)


@advantages.register("opo", traits={"compares_group"})
def opo(batch: Batch, params: NoParams) -> Advantages:
    """Compute s − Σ(ℓs)/Σℓ over the group, ℓ = trained tokens: the variance-optimal baseline under a simplification.

    Source: OPO, Hao et al. 2025, arXiv:2505.23585.
    """
    groups = _groups(batch)
    lengths = trained_counts(trained_mask(batch), batch.lengths).to(groups.scores)
    baseline = groups.sums(lengths * groups.shifted) / groups.sums(lengths).clamp(min=1)
    return _spread(groups.shifted - baseline, batch)


@advantages.register("gpg", traits={"compares_group"})
def gpg(batch: Batch, params: NoParams) -> Advantages:
    """α(s − μ) with α = B / (B − M), M = samples in groups of equal scores; use with the loss ``gpg``.

    Source: GPG, Chu et al. 2025, arXiv:2504.02546.
    """
    groups = _groups(batch)
    spread = groups.sums(groups.shifted) > 0
    alpha = len(batch) / max(int(spread.sum()), 1)
    return _spread(alpha * groups.deviation, batch)


class PassAtKParams(Config):
    """Parameters of ``pass_at_k``."""

    normalize_std: bool = Field(True, description="Divide by the group's σ.")
    epsilon: float = Field(1e-6, gt=0, description="Added to σ.")


@advantages.register("pass_at_k", params=PassAtKParams, traits={"compares_group"})
def pass_at_k(batch: Batch, params: PassAtKParams) -> Advantages:
    """Train only the best of a group, with its lead (s₁ − s₂) / (σ + ε) over the second best.

    Source: Tang et al. 2025, "Optimizing language models for inference time objectives", arXiv:2503.19595.
    """
    groups = _groups(batch)
    order = groups.scores.argsort(descending=True, stable=True)
    order = order[groups.index[order].argsort(stable=True)]  # group by group, best first
    sizes = groups.index.bincount()
    starts = sizes.cumsum(0) - sizes
    first, second = order[starts], order[starts + (sizes > 1)]  # a sample alone has no lead over itself
    lead = torch.zeros_like(groups.scores)
    lead[first] = groups.scores[first] - groups.scores[second]
    return _spread(lead / (groups.std + params.epsilon) if params.normalize_std else lead, batch)


@dataclass(frozen=True)
class Groups:
    """Per sample, all ``[B]``: ``scores`` (fp64), ``index`` of its group, ``count`` of samples in it, and ``shifted``:
    the score above the lowest of the group. Baselines are subtracted from ``shifted``, so that equal scores cancel
    without rounding."""

    scores: torch.Tensor
    index: torch.Tensor
    count: torch.Tensor
    shifted: torch.Tensor

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``values`` over each sample's group."""
        return torch.zeros_like(values).index_add_(0, self.index, values)[self.index]

    @property
    def deviation(self) -> torch.Tensor:
        """s − μ."""
        return self.shifted - self.sums(self.shifted) / self.count

    @property
    def std(self) -> torch.Tensor:
        """σ, unbiased; 0 of a sample alone."""
        return (self.sums(self.deviation.square()) / (self.count - 1).clamp(min=1)).sqrt()


def grouped(scores: torch.Tensor, group: torch.Tensor) -> Groups:
    """Return ``scores`` ``[B]`` fp64 with those of the same ``group`` ``[B]``, of integers."""
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    lowest = torch.zeros_like(scores).scatter_reduce_(0, index, scores, "amin", include_self=False)
    return Groups(scores, index, counts[index], scores - lowest[index])


def _groups(batch: Batch) -> Groups:
    return grouped(sequence_sums(batch.flat("token_rewards").double(), batch.lengths), batch["group"])


def _spread(values: torch.Tensor, batch: Batch) -> Advantages:
    """Give every trained token its sample's value ``[B]``."""
    rewards = batch.flat("token_rewards")
    return Advantages(torch.where(trained_mask(batch), per_token(values.to(rewards.dtype), batch.lengths), 0))
