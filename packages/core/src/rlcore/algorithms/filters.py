"""Which groups are worth training on."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator

from rlcore.algorithms.registries import sampling_filters
from rlcore.config import Config, Unlimited
from rlcore.config.registry import NoParams


@sampling_filters.register("nonzero-spread")
def nonzero_spread(scores: torch.Tensor, group: torch.Tensor, params: NoParams) -> torch.Tensor:
    """Keep groups whose scores are not all equal: the others have no group-relative advantage.

    Source: dynamic sampling, DAPO, Yu et al. 2025, arXiv:2503.14476 (§3.2).
    """
    low, high = (_reduce(scores, group, how) for how in ("amin", "amax"))
    return high > low


class MeanScoreParams(Config):
    """Parameters of ``mean-score``."""

    low: Unlimited = Field(0.0, description="Keep groups with a higher mean score; -.inf sets no bound.")
    high: Unlimited = Field(1.0, description="Keep groups with a lower mean score; .inf sets no bound.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


@sampling_filters.register("mean-score", params=MeanScoreParams)
def mean_score(scores: torch.Tensor, group: torch.Tensor, params: MeanScoreParams) -> torch.Tensor:
    """Keep groups whose mean score lies strictly between two bounds: neither too easy nor too hard.

    Source: online difficulty filtering, Bae et al. 2025, arXiv:2504.03380.
    """
    mean = _reduce(scores, group, "mean")
    return (mean > params.low) & (mean < params.high)


def _reduce(scores: torch.Tensor, group: torch.Tensor, how: str) -> torch.Tensor:
    """Return the minimum, maximum or mean of each sample's group, ``[B]``."""
    index = torch.unique(group, return_inverse=True)[1]
    return torch.zeros_like(scores).scatter_reduce_(0, index, scores, how, include_self=False)[index]
