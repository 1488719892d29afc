"""Preference losses of pairs without a reference policy."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid, relu

from rlcore.algorithms.bounds import bounded
from rlcore.algorithms.registries import PreferenceInputs, Preferences, preference_losses
from rlcore.config import Config

LEAST_DOUBT = 2.0**-24
"""Log-probs per token nearer to 0 are those of a probability that fp32 rounds to 1."""


class ORPOParams(Config):
    """Parameters of ``orpo``."""

    beta: float = Field(0.1, gt=0, description="Weight of the odds ratio, to 1 of the likelihood (λ in the paper).")


class SimPOParams(Config):
    """Parameters of ``simpo``."""

    beta: float = Field(2.0, gt=0, description="Scale of the reward.")
    gamma: float = Field(1.0, ge=0, description="By how much the chosen answer's reward is to be higher.")


class CPOParams(Config):
    """Parameters of ``cpo``."""

    beta: float = Field(0.1, gt=0, description="Scale of the reward.")
    alpha: float = Field(1.0, ge=0, description="Weight of the chosen answer's negative log-likelihood per token.")


class SLiCParams(Config):
    """Parameters of ``slic``."""

    delta: float = Field(1.0, gt=0, description="Margin between the log-probs of both answers.")
    alpha: float = Field(1.0, ge=0, description="Weight of the chosen answer's negative log-likelihood per token.")


@preference_losses.register("orpo", params=ORPOParams, together="pair")
def orpo(inputs: PreferenceInputs, params: ORPOParams) -> Preferences:
    """−m_c − β·logσ(log odds_c − log odds_r), where m = mean log π and odds = eᵐ / (1 − eᵐ): likelihood of the chosen
    answer and odds ratio together, so that no fine-tuning is needed before.

    Source: Hong et al. 2024, arXiv:2403.07691.
    """
    # fp32 gives probability 1 for what is merely very likely; its odds would be infinite
    means = [bounded(side.mean_logprobs, -math.inf, -LEAST_DOUBT) for side in (inputs.chosen, inputs.rejected)]
    odds = [mean - (-mean.expm1()).log() for mean in means]
    losses = -inputs.chosen.mean_logprobs - params.beta * logsigmoid(odds[0] - odds[1])
    return Preferences(losses, params.beta * means[0], params.beta * means[1])


@preference_losses.register("simpo", params=SimPOParams, together="pair")
def simpo(inputs: PreferenceInputs, params: SimPOParams) -> Preferences:
    """−logσ(β(m_c − m_r) − γ) with m = mean log π, which is what generation ranks answers by.

    Source: Meng et al. 2024, arXiv:2405.14734.
    """
    chosen, rejected = (params.beta * side.mean_logprobs for side in (inputs.chosen, inputs.rejected))
    return Preferences(-logsigmoid(chosen - rejected - params.gamma), chosen, rejected)


@preference_losses.register("cpo", params=CPOParams, together="pair")
def cpo(inputs: PreferenceInputs, params: CPOParams) -> Preferences:
    """−logσ(β(log π_c − log π_r)) − α·m_c: DPO against a uniform reference, with the chosen answer's likelihood.

    Source: Xu et al. 2024, arXiv:2401.08417.
    """
    chosen, rejected = params.beta * inputs.chosen.logprobs, params.beta * inputs.rejected.logprobs
    losses = -logsigmoid(chosen - rejected) - params.alpha * inputs.chosen.mean_logprobs
    return Preferences(losses, chosen, rejected)


@preference_losses.register("slic", params=SLiCParams, together="pair")
def slic(inputs: PreferenceInputs, params: SLiCParams) -> Preferences:
    """max(0, δ − log π_c + log π_r) − α·m_c: calibration by a margin, with the chosen answer's likelihood.

    Source: SLiC-HF, Zhao et al. 2023, arXiv:2305.10425.
    """
    chosen, rejected = inputs.chosen.logprobs, inputs.rejected.logprobs
    losses: torch.Tensor = relu(params.delta - chosen + rejected) - params.alpha * inputs.chosen.mean_logprobs
    return Preferences(losses, chosen, rejected)
