"""Policy losses whose importance ratio is taken token by token.

d = logπ − logπ_old, ratio = exp(d) with d bounded by ±20; beyond, the gradient is that at the bound.
"""

from __future__ import annotations

import torch
from pydantic import Field

from rlcore.algorithms.bounds import LOG_RATIO_LIMIT, bounded
from rlcore.algorithms.registries import PolicyLossInputs, policy_losses
from rlcore.algorithms.sequences import record_mean
from rlcore.config import Config, Unlimited
from rlcore.config.registry import NoParams
from rlcore.metrics import Metrics


class PPOParams(Config):
    """Parameters of ``ppo``."""

    clip_low: float = Field(0.2, ge=0, le=1, description="The ratio is clipped below 1 − clip_low.")
    clip_high: Unlimited = Field(
        0.2, ge=0, description="The ratio is clipped above 1 + clip_high (DAPO: 0.28); .inf clips nothing there."
    )
    dual_clip: float | None = Field(
        3.0, gt=1, description="Bound c on the ratio of tokens with negative advantage; null has none."
    )


@policy_losses.register("ppo", params=PPOParams, traits={"vanishes_with_advantage", "importance_ratio"})
def ppo(inputs: PolicyLossInputs, params: PPOParams) -> tuple[torch.Tensor, Metrics]:
    """max(−A·ratio, −A·clip(ratio, 1 − ε_low, 1 + ε_high)); where A < 0 at most −A·c.

    Source: PPO, Schulman et al. 2017, arXiv:1707.06347; dual clip: Ye et al. 2020, arXiv:1912.09729; separate bounds
    ("clip-higher"): DAPO, Yu et al. 2025, arXiv:2503.14476.
    """
    advantages = inputs.advantages
    ratio, metrics = token_ratio(inputs)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - params.clip_low, 1 + params.clip_high)
    losses = torch.maximum(plain, clipped)
    record_mean(metrics, "pg_clipfrac", clipped > plain, inputs.mask)
    if params.dual_clip is not None:
        bound = -advantages * params.dual_clip
        bounded = (advantages < 0) & (losses > bound)
        losses = torch.where(bounded, bound, losses)
        record_mean(metrics, "pg_clipfrac_lower", bounded, inputs.mask)
    return losses, metrics


class CISPOParams(Config):
    """Parameters of ``cispo``."""

    clip_low: float = Field(1.0, ge=0, le=1, description="The weight is at least 1 − clip_low; 1 has no lower bound.")
    clip_high: Unlimited = Field(4.0, ge=0, description="The weight is at most 1 + clip_high; .inf has no upper bound.")


@policy_losses.register("cispo", params=CISPOParams, traits={"vanishes_with_advantage", "importance_ratio"})
def cispo(inputs: PolicyLossInputs, params: CISPOParams) -> tuple[torch.Tensor, Metrics]:
    """−stopgrad(clip(ratio, 1 − ε_low, 1 + ε_high))·A·logπ: clips the weight, and no token loses its gradient.

    Source: CISPO, MiniMax-M1 2025, arXiv:2506.13585; bounds: ScaleRL, Khatri et al. 2025, arXiv:2510.13786.
    """
    ratio, metrics = token_ratio(inputs)
    ratio = ratio.detach()
    weight = ratio.clamp(1 - params.clip_low, 1 + params.clip_high)
    record_mean(metrics, "pg_clipfrac", weight != ratio, inputs.mask)
    return -weight * inputs.advantages * inputs.logprobs, metrics


class SAPOParams(Config):
    """Parameters of ``sapo``."""

    tau_positive: float = Field(1.0, gt=0, description="Temperature of the gate where the advantage is positive.")
    tau_negative: float = Field(1.05, gt=0, description="Temperature of the gate elsewhere.")


@policy_losses.register("sapo", params=SAPOParams, traits={"vanishes_with_advantage", "importance_ratio"})
def sapo(inputs: PolicyLossInputs, params: SAPOParams) -> tuple[torch.Tensor, Metrics]:
    """−A·σ(τ(ratio − 1))·4/τ: a smooth gate instead of a clip; its slope at ratio 1 is that of −A·ratio.

    Source: SAPO, Gao et al. 2025, arXiv:2511.20347.
    """
    ratio, metrics = token_ratio(inputs)
    positive = inputs.advantages > 0
    tau = torch.full_like(ratio, params.tau_negative).masked_fill(positive, params.tau_positive)
    return -inputs.advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, metrics


@policy_losses.register("gpg", traits={"vanishes_with_advantage"})
@policy_losses.register("reinforce", traits={"vanishes_with_advantage"})
def reinforce(inputs: PolicyLossInputs, params: NoParams) -> tuple[torch.Tensor, Metrics]:
    """−logπ·A: the plain policy gradient, for samples of the current policy.

    Source: REINFORCE, Williams 1992, Machine Learning 8; "gpg" is the same loss: Chu et al. 2025, arXiv:2504.02546.
    """
    _, metrics = token_ratio(inputs)
    return -inputs.logprobs * inputs.advantages, metrics


def token_ratio(inputs: PolicyLossInputs) -> tuple[torch.Tensor, Metrics]:
    """π / π_old per token ``[T]``, and the metric ``ppo_kl``: the mean of logπ_old − logπ."""
    difference = bounded(inputs.logprobs - inputs.old_logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    metrics = Metrics()
    record_mean(metrics, "ppo_kl", -difference, inputs.mask)
    return difference.exp(), metrics
