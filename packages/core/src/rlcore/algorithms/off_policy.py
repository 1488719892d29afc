"""When the sampler is not quite the policy: importance weights, and how far both are apart.

Inference engines compute log-probs with other kernels, precisions and (asynchronously) older weights than the trainer.
ρ = π_old / π_rollout, per token or sequence. Where π_old is the rollout's own, the current policy takes its place.
"""

from __future__ import annotations

from typing import Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator

from rlcore.algorithms.bounds import LOG_RATIO_LIMIT
from rlcore.algorithms.registries import corrections
from rlcore.algorithms.sequences import per_token, record_mean, sequence_means, sequence_sums
from rlcore.config import Config, Unlimited
from rlcore.metrics import Metrics

# Always reported, whatever correction is on: what ``tis`` would clip and ``mis`` would mask by default.
USUAL_LOW, USUAL_HIGH = 0.5, 2.0


class TISParams(Config):
    """Parameters of ``tis``."""

    cap: Unlimited = Field(2.0, gt=0, description="Largest weight; .inf bounds none.")
    level: Literal["token", "sequence"] = Field("token", description="Take ρ per token, or its product per sequence.")


@corrections.register("tis", params=TISParams, traits={"importance_ratio"})
def tis(
    rollout_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    params: TISParams,
) -> tuple[torch.Tensor, Metrics]:
    """min(ρ, cap): truncated importance sampling.

    Source: Ionides 2008, "Truncated importance sampling", J. Comput. Graph. Stat. 17; for rollouts: Yao et al. 2025,
    "Your efficient RL framework secretly brings you off-policy RL training", https://fengyao.notion.site/off-policy-rl.
    """
    difference = (old_logprobs - rollout_logprobs).detach()
    if params.level == "sequence":
        difference = per_token(sequence_sums(torch.where(mask.bool(), difference, 0), lengths), lengths)
    ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return _weights(ratio, ratio.clamp(max=params.cap), mask)


class MISParams(Config):
    """Parameters of ``mis``."""

    low: float = Field(USUAL_LOW, ge=0, description="Tokens or sequences with a smaller ρ are dropped.")
    high: Unlimited = Field(
        USUAL_HIGH, gt=0, description="Tokens or sequences with a larger ρ are dropped; .inf drops none."
    )
    level: Literal["token", "sequence", "geometric"] = Field(
        "token",
        description="Take ρ per token, its product per sequence, or the geometric mean of a sequence's tokens "
        "(whose bounds belong close to 1).",
    )
    weight: Literal["ratio", "one"] = Field(
        "ratio", description="What is not dropped weighs ρ (of the level), or 1: rejection only."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        return _check_order(self, self.low, self.high)


@corrections.register("mis", params=MISParams, traits={"importance_ratio"})
def mis(
    rollout_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    params: MISParams,
) -> tuple[torch.Tensor, Metrics]:
    """ρ inside [low, high], 0 outside, per token or for whole sequences: masked importance sampling.

    Source: Liu, Li et al. 2025, "When speed kills stability: Demystifying RL collapse from the training-inference
    mismatch", https://richardli.xyz/post/rl-collapse-training-inference (token and sequence level, and the geometric
    mean, as in verl's rollout correction); DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv:2512.02556, masks by the geometric
    mean too.
    """
    difference = torch.where(mask.bool(), (old_logprobs - rollout_logprobs).detach(), 0)
    if params.level == "sequence":
        difference = per_token(sequence_sums(difference, lengths), lengths)
    elif params.level == "geometric":
        difference = per_token(sequence_means(difference, mask, lengths), lengths)
    ratio = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    inside = (ratio >= params.low) & (ratio <= params.high)
    kept = ratio if params.weight == "ratio" else torch.ones_like(ratio)
    return _weights(kept, torch.where(inside, kept, 0), mask)


class IcePopParams(Config):
    """Parameters of ``icepop``."""

    low: float = Field(0.5, ge=0, description="Tokens with a smaller ρ are dropped.")
    high: Unlimited = Field(5.0, gt=0, description="Tokens with a larger ρ are dropped; .inf drops none.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        return _check_order(self, self.low, self.high)


@corrections.register("icepop", params=IcePopParams, traits={"importance_ratio"})
def icepop(
    rollout_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    mask: torch.Tensor,
    lengths: torch.Tensor,
    params: IcePopParams,
) -> tuple[torch.Tensor, Metrics]:
    """ρ inside [low, high], 0 outside: tokens on which sampler and trainer disagree do not train.

    Source: IcePop, Ling Team 2025, "Every step evolves" (Ring-1T), arXiv:2510.18855.
    """
    ratio = (old_logprobs - rollout_logprobs).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    inside = (ratio >= params.low) & (ratio <= params.high)
    return _weights(ratio, torch.where(inside, ratio, 0), mask)


C = TypeVar("C", bound=Config)


def _check_order(params: C, low: float, high: float) -> C:
    if low > high:
        raise ValueError(f"low ({low}) must not exceed high ({high})")
    return params


def _weights(ratio: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
    metrics = Metrics()
    record_mean(metrics, "correction_weight", weights, mask)
    record_mean(metrics, "correction_clipfrac", weights != ratio, mask)
    return weights, metrics


def mismatch_metrics(rollout_logprobs: torch.Tensor, logprobs: torch.Tensor, mask: torch.Tensor) -> Metrics:
    """Compare the log-probs of sampler and trainer over trained tokens; mergeable over micro-batches.

    Returns:
        ``rollout_kl`` (k1) and ``rollout_kl_k3`` estimate KL(π_rollout ‖ π), ``rollout_prob_diff`` is the mean of
        ``|π − π_rollout|``, ``rollout_ratio_max`` the largest ρ = π / π_rollout (0 if nothing is trained on),
        ``rollout_log_ratio_p001`` and ``rollout_log_ratio_p999`` the 0.1 % and 99.9 % quantiles of log ρ (within 6 %
        of their size), ``rollout_clipfrac`` the fraction with ρ > 2, which ``tis`` would clip by default, and
        ``rollout_maskfrac`` the fraction outside [0.5, 2], which ``mis`` would drop.
    """
    difference = torch.where(mask.bool(), logprobs.detach() - rollout_logprobs, 0)
    difference = difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = difference.exp()
    metrics = Metrics()
    record_mean(metrics, "rollout_kl", -difference, mask)
    record_mean(metrics, "rollout_kl_k3", difference.expm1() - difference, mask)  # eˣ − x − 1 without its rounding
    record_mean(metrics, "rollout_prob_diff", (logprobs.detach().exp() - rollout_logprobs.exp()).abs(), mask)
    record_mean(metrics, "rollout_clipfrac", ratio > USUAL_HIGH, mask)
    record_mean(metrics, "rollout_maskfrac", (ratio < USUAL_LOW) | (ratio > USUAL_HIGH), mask)
    metrics.quantile("rollout_log_ratio_p001", difference, 0.001, mask)
    metrics.quantile("rollout_log_ratio_p999", difference, 0.999, mask)
    if len(ratio):
        metrics.max("rollout_ratio_max", torch.where(mask.bool(), ratio, 0).max())
    return metrics
