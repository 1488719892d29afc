"""Policy losses whose importance ratio is taken over whole sequences.

Aggregate them with ``seq-mean-token-mean``, for which they are derived: the tokens of a sequence share one ratio.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from pydantic import Field

from rlcore.algorithms.bounds import LOG_RATIO_LIMIT, bounded
from rlcore.algorithms.registries import PolicyLossInputs, policy_losses
from rlcore.algorithms.sequences import per_token, record_mean, sequence_means
from rlcore.algorithms.token_losses import token_ratio
from rlcore.config import Config, Unlimited
from rlcore.config.registry import Trait
from rlcore.metrics import Metrics

SEQUENCE_LOG_RATIO_LIMIT = 10.0
SEQUENCE_LOSS: Final[set[Trait]] = {"vanishes_with_advantage", "importance_ratio", "sequence_ratio"}


class GSPOParams(Config):
    """Parameters of ``gspo``."""

    clip_low: float = Field(3e-4, ge=0, le=1, description="The sequence ratio is clipped below 1 − clip_low.")
    clip_high: Unlimited = Field(
        4e-4, ge=0, description="The sequence ratio is clipped above 1 + clip_high; .inf clips nothing there."
    )


@policy_losses.register("gspo", params=GSPOParams, traits=SEQUENCE_LOSS)
def gspo(inputs: PolicyLossInputs, params: GSPOParams) -> tuple[torch.Tensor, Metrics]:
    """max(−A·s, −A·clip(s, 1 − ε_low, 1 + ε_high)) with s = exp(mean_t (logπ − logπ_old)), the length-normalised
    ratio of the sequence.

    Each token carries the ratio in value and its own logπ in gradient (the paper's GSPO-token), so advantages may
    differ within a sequence. log s is at most 10; beyond, the gradient is that at 10.

    Source: GSPO, Zheng et al. 2025, arXiv:2507.18071.
    """
    _, metrics = token_ratio(inputs)
    difference = (inputs.logprobs - inputs.old_logprobs).detach()
    log_ratio = per_token(sequence_means(difference, inputs.mask, inputs.lengths), inputs.lengths)
    log_ratio = log_ratio + inputs.logprobs - inputs.logprobs.detach()
    ratio = bounded(log_ratio, -math.inf, SEQUENCE_LOG_RATIO_LIMIT).exp()
    plain = -inputs.advantages * ratio
    clipped = -inputs.advantages * ratio.clamp(1 - params.clip_low, 1 + params.clip_high)
    record_mean(metrics, "pg_clipfrac", clipped > plain, inputs.mask)
    return torch.maximum(plain, clipped), metrics


class GMPOParams(Config):
    """Parameters of ``gmpo``; bounds are on the logarithm of a token's ratio."""

    clip_low: Unlimited = Field(0.4, ge=0, description="Log-ratios are clipped below −clip_low; .inf clips none.")
    clip_high: Unlimited = Field(0.4, ge=0, description="Log-ratios are clipped above clip_high; .inf clips none.")


@policy_losses.register("gmpo", params=GMPOParams, traits=SEQUENCE_LOSS)
def gmpo(inputs: PolicyLossInputs, params: GMPOParams) -> tuple[torch.Tensor, Metrics]:
    """−A·exp(mean_t d̃): the geometric mean of token ratios, each clipped on the side its advantage's sign asks for.

    d̃ = min(d, clip(d)) where A > 0, max(d, clip(d)) where A < 0. A is the sequence's mean advantage.

    Source: GMPO, Zhao et al. 2025, arXiv:2507.20673.
    """
    advantages, mask, lengths = inputs.advantages, inputs.mask, inputs.lengths
    _, metrics = token_ratio(inputs)
    difference = bounded(inputs.logprobs - inputs.old_logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    clipped = difference.clamp(-params.clip_low, params.clip_high)
    sign = advantages.sign()
    kept = sign * torch.minimum(sign * difference, sign * clipped)
    beyond = clipped != difference
    record_mean(metrics, "pg_clipfrac", beyond & (advantages > 0), mask)
    record_mean(metrics, "pg_clipfrac_lower", beyond & (advantages < 0), mask)
    losses = -sequence_means(advantages, mask, lengths) * sequence_means(kept, mask, lengths).exp()
    return per_token(losses, lengths) * mask, metrics
