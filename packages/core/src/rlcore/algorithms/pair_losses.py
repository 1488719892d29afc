"""Preference losses of pairs that compare the policy with a reference.

``r`` is log(π / π_ref) of an answer: the sum over its tokens, unless a loss says otherwise. Log-probs are in fp64 here.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid, relu

from rlcore.algorithms.registries import PreferenceInputs, Preferences, preference_losses
from rlcore.config import Config

REFERENCE = frozenset({"ref_answer_logprob"})


class BetaParams(Config):
    """The strength of the tie to the reference."""

    beta: float = Field(0.1, gt=0, description="Higher values keep the policy closer to the reference.")


class SmoothedParams(BetaParams):
    """Parameters of losses that assume some labels to be wrong."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Probability that chosen and rejected are swapped.")


class EXOParams(BetaParams):
    """Parameters of ``exo``."""

    label_smoothing: float = Field(1e-3, gt=0, lt=0.5, description="Probability that chosen and rejected are swapped.")


class ODPOParams(BetaParams):
    """Parameters of ``odpo``."""

    alpha: float = Field(1.0, ge=0, description="Factor on the margins of the data.")


class DPOPParams(BetaParams):
    """Parameters of ``dpop``."""

    penalty: float = Field(50.0, ge=0, description="Weight of a chosen answer's loss of probability.")


def _with_rewards(losses: torch.Tensor, inputs: PreferenceInputs, beta: float) -> Preferences:
    """Return ``losses`` with the rewards β·r."""
    return Preferences(losses, beta * inputs.chosen.log_ratio, beta * inputs.rejected.log_ratio)


def _margins(inputs: PreferenceInputs) -> torch.Tensor:
    return inputs.chosen.log_ratio - inputs.rejected.log_ratio


@preference_losses.register("dpo", params=SmoothedParams, required_columns=REFERENCE, together="pair")
def dpo(inputs: PreferenceInputs, params: SmoothedParams) -> Preferences:
    """−(1 − ε)·logσ(h) − ε·logσ(−h) with h = β(r_c − r_r); ε is the label smoothing, and with it this is cDPO.

    Source: DPO, Rafailov et al. 2023, arXiv:2305.18290; cDPO, Mitchell 2023, ericmitchell.ai/cdpo.pdf.
    """
    h, smoothing = params.beta * _margins(inputs), params.label_smoothing
    return _with_rewards(-(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h), inputs, params.beta)


@preference_losses.register("robust-dpo", params=SmoothedParams, required_columns=REFERENCE, together="pair")
def robust_dpo(inputs: PreferenceInputs, params: SmoothedParams) -> Preferences:
    """(−(1 − ε)·logσ(h) + ε·logσ(−h)) / (1 − 2ε): DPO's loss in expectation if a share ε of the labels is swapped.

    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    h, smoothing = params.beta * _margins(inputs), params.label_smoothing
    losses = (-(1 - smoothing) * logsigmoid(h) + smoothing * logsigmoid(-h)) / (1 - 2 * smoothing)
    return _with_rewards(losses, inputs, params.beta)


@preference_losses.register("ln-dpo", params=SmoothedParams, required_columns=REFERENCE, together="pair")
def length_normalized_dpo(inputs: PreferenceInputs, params: SmoothedParams) -> Preferences:
    """``dpo`` with r per token, so that long answers weigh as much as short ones. β is then about 2 to 10.

    Source: Tülu 3, Lambert et al. 2024, arXiv:2411.15124 (§5.1).
    """
    chosen, rejected = (params.beta * side.mean_log_ratio for side in (inputs.chosen, inputs.rejected))
    h, smoothing = chosen - rejected, params.label_smoothing
    return Preferences(-(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h), chosen, rejected)


@preference_losses.register("odpo", params=ODPOParams, required_columns=REFERENCE | {"margin"}, together="pair")
def dpo_with_offset(inputs: PreferenceInputs, params: ODPOParams) -> Preferences:
    """−logσ(β(r_c − r_r) − α·margin): the rewards differ by what the data says that the answers do.

    Source: ODPO, Amini et al. 2024, arXiv:2402.10571 (eq. 8).
    """
    assert inputs.margins is not None
    losses = -logsigmoid(params.beta * _margins(inputs) - params.alpha * inputs.margins)
    return _with_rewards(losses, inputs, params.beta)


@preference_losses.register("ipo", params=BetaParams, required_columns=REFERENCE, together="pair")
def ipo(inputs: PreferenceInputs, params: BetaParams) -> Preferences:
    """(r_c − r_r − 1/(2β))² with r per token: the margin is drawn to a finite value, also by clear preferences.

    Source: Azar et al. 2023, arXiv:2310.12036 (eq. 17, whose τ is β).
    """
    chosen, rejected = inputs.chosen.mean_log_ratio, inputs.rejected.mean_log_ratio
    losses = (chosen - rejected - 1 / (2 * params.beta)).square()
    return Preferences(losses, params.beta * chosen, params.beta * rejected)


@preference_losses.register("hinge", params=BetaParams, required_columns=REFERENCE, together="pair")
def hinge(inputs: PreferenceInputs, params: BetaParams) -> Preferences:
    """max(0, 1 − β(r_c − r_r)): no gradient once the margin is reached.

    Source: RSO, Liu et al. 2023, arXiv:2309.06657 (eq. 8).
    """
    return _with_rewards(relu(1 - params.beta * _margins(inputs)), inputs, params.beta)


@preference_losses.register("exo", params=EXOParams, required_columns=REFERENCE, together="pair")
def exo(inputs: PreferenceInputs, params: EXOParams) -> Preferences:
    """KL(p ‖ q) from p = (σ(h), σ(−h)), h = β(r_c − r_r), to the smoothed labels q = (1 − ε, ε).

    Source: EXO, Ji et al. 2024, arXiv:2402.00856 (eq. 16).
    """
    h, smoothing = params.beta * _margins(inputs), params.label_smoothing
    right, wrong = logsigmoid(h) - math.log1p(-smoothing), logsigmoid(-h) - math.log(smoothing)
    losses = h.sigmoid() * right + (-h).sigmoid() * wrong
    return _with_rewards(losses, inputs, params.beta)


@preference_losses.register("nca", params=BetaParams, required_columns=REFERENCE, together="pair")
def nca(inputs: PreferenceInputs, params: BetaParams) -> Preferences:
    """−logσ(βr_c) − ½·logσ(−βr_c) − ½·logσ(−βr_r): keeps the probability of chosen answers from falling.

    Source: Chen et al. 2024, arXiv:2402.05369 (table 2, pairwise).
    """
    chosen, rejected = params.beta * inputs.chosen.log_ratio, params.beta * inputs.rejected.log_ratio
    losses = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return _with_rewards(losses, inputs, params.beta)


@preference_losses.register("sppo", params=BetaParams, required_columns=REFERENCE, together="pair")
def sppo(inputs: PreferenceInputs, params: BetaParams) -> Preferences:
    """(r_c − 1/(2β))² + (r_r + 1/(2β))², with win rates of 1 and 0.

    Source: Wu et al. 2024, arXiv:2405.00675 (eq. 4.6 with hard probabilities).
    """
    target = 0.5 / params.beta
    losses = (inputs.chosen.log_ratio - target).square() + (inputs.rejected.log_ratio + target).square()
    return _with_rewards(losses, inputs, params.beta)


@preference_losses.register("apo-zero", params=BetaParams, required_columns=REFERENCE, together="pair")
def apo_zero(inputs: PreferenceInputs, params: BetaParams) -> Preferences:
    """1 − σ(βr_c) + σ(βr_r): chosen up, rejected down; for answers that are better than the policy's.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266 (eq. 7).
    """
    losses = (-params.beta * inputs.chosen.log_ratio).sigmoid() + (params.beta * inputs.rejected.log_ratio).sigmoid()
    return _with_rewards(losses, inputs, params.beta)


@preference_losses.register("apo-down", params=BetaParams, required_columns=REFERENCE, together="pair")
def apo_down(inputs: PreferenceInputs, params: BetaParams) -> Preferences:
    """σ(βr_c) + 1 − σ(β(r_c − r_r)): both down, rejected more; for answers that are worse than the policy's.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266 (eq. 8).
    """
    losses = (params.beta * inputs.chosen.log_ratio).sigmoid() + (-params.beta * _margins(inputs)).sigmoid()
    return _with_rewards(losses, inputs, params.beta)


@preference_losses.register("dpop", params=DPOPParams, required_columns=REFERENCE, together="pair")
def dpo_positive(inputs: PreferenceInputs, params: DPOPParams) -> Preferences:
    """−logσ(β(r_c − r_r − λ·max(0, −r_c))): chosen answers must not become less likely than under the reference.

    Source: Smaug, Pal et al. 2024, arXiv:2402.13228 (eq. 3).
    """
    lost = relu(-inputs.chosen.log_ratio)
    return _with_rewards(-logsigmoid(params.beta * (_margins(inputs) - params.penalty * lost)), inputs, params.beta)
