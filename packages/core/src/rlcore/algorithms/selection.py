"""Which samples to imitate, and how much: rejection sampling, best-of-n and their relatives."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from rlcore.algorithms.registries import Advantages, advantages, sample_selectors
from rlcore.algorithms.sequences import per_token, trained_mask
from rlcore.batch import Batch
from rlcore.config import Config, Unlimited
from rlcore.config.registry import NoParams


@advantages.register("sample_weight", required_columns={"sample_weight"}, traits={"imitates"})
def sample_weight(batch: Batch, params: NoParams) -> Advantages:
    """Give every trained token the weight of its sample: with the loss ``reinforce`` that is weighted SFT.

    Source: RAFT, Dong et al. 2023, arXiv:2304.06767; reward-weighted regression, Peters and Schaal 2007.
    """
    weights = batch["sample_weight"].to(batch.flat("token_rewards"))
    return Advantages(torch.where(trained_mask(batch), per_token(weights, batch.lengths), 0))


class BestParams(Config):
    """Parameters of ``best``."""

    k: int = Field(1, ge=1, description="Samples to keep of each prompt.")
    min_score: Unlimited = Field(-math.inf, description="Keep no sample with a lower score; -.inf sets no bound.")


@sample_selectors.register("best", params=BestParams)
def best(scores: torch.Tensor, group: torch.Tensor, params: BestParams) -> torch.Tensor:
    """Keep the k best of each prompt; of equal scores the first.

    Source: RAFT, Dong et al. 2023, arXiv:2304.06767.
    """
    return ((rank_in_group(scores, group) < params.k) & (scores >= params.min_score)).float()


class ThresholdParams(Config):
    """Parameters of ``threshold``."""

    min_score: float = Field(1.0, description="Keep samples with this score or a higher one.")


@sample_selectors.register("threshold", params=ThresholdParams)
def threshold(scores: torch.Tensor, group: torch.Tensor, params: ThresholdParams) -> torch.Tensor:
    """Keep all samples that are good enough: all right answers, with a reward of 0 and 1.

    Source: STaR, Zelikman et al. 2022, arXiv:2203.14465; rejection-sampling fine-tuning, Yuan et al. 2023,
    arXiv:2308.01825; ReST-EM, Singh et al. 2023, arXiv:2312.06585.
    """
    return (scores >= params.min_score).float()


class TopFractionParams(Config):
    """Parameters of ``top-fraction``."""

    fraction: float = Field(0.25, gt=0, le=1, description="Share of the batch to keep, rounded up.")


@sample_selectors.register("top-fraction", params=TopFractionParams)
def top_fraction(scores: torch.Tensor, group: torch.Tensor, params: TopFractionParams) -> torch.Tensor:
    """Keep the best samples of the whole batch, whatever their prompts; of equal scores the first.

    Source: ReST, Gulcehre et al. 2023, arXiv:2308.08998 (percentiles of the reward); RAFT's global ranking.
    """
    count = math.ceil(params.fraction * len(scores) - 1e-9)  # 0.1 · 30 is slightly more than 3
    return (rank_in_group(scores, torch.zeros_like(group)) < count).float()


class ExponentialParams(Config):
    """Parameters of ``exponential``."""

    beta: float = Field(1.0, gt=0, description="Temperature: towards 0 only the best of a prompt counts.")
    max_weight: Unlimited = Field(20.0, gt=0, description="Weights are at most this; .inf sets no bound.")


@sample_selectors.register("exponential", params=ExponentialParams)
def exponential(scores: torch.Tensor, group: torch.Tensor, params: ExponentialParams) -> torch.Tensor:
    """Keep all samples, with the weight n · exp(s/β) / Σ exp(s/β) over the n samples of the prompt: 1 on average.

    Source: advantage-weighted regression, Peng et al. 2019, arXiv:1910.00177; reward-weighted regression, Peters and
    Schaal 2007.
    """
    scaled = scores.double()
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    highest = torch.zeros(len(counts), dtype=torch.float64).scatter_reduce_(
        0, index, scaled, "amax", include_self=False
    )
    powers = ((scaled - highest[index]) / params.beta).exp()
    sums = torch.zeros_like(highest).index_add_(0, index, powers)
    weights: torch.Tensor = powers * counts[index] / sums[index]
    return weights.clamp(max=params.max_weight).float()


def rank_in_group(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the rank of each score in its group, ``[B]`` int64: 0 is the highest, equal scores in their order."""
    _, index, counts = torch.unique(group, return_inverse=True, return_counts=True)
    order = scores.argsort(descending=True, stable=True)
    order = order[index[order].argsort(stable=True)]  # group by group, best first
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(index)
    ranks[order] = torch.arange(len(order)) - starts[index[order]]
    return ranks
