"""Preference losses of single answers that are known to be good or bad."""

from __future__ import annotations

import torch
from pydantic import Field

from rlcore.algorithms.pair_losses import REFERENCE, BetaParams
from rlcore.algorithms.registries import PreferenceInputs, Preferences, preference_losses


class WeightedParams(BetaParams):
    """Parameters of losses of good and bad answers."""

    desirable_weight: float = Field(1.0, gt=0, description="Weight of good answers.")
    undesirable_weight: float = Field(
        1.0, gt=0, description="Weight of bad answers; n_good·w_good is to be 1 to 4/3 times n_bad·w_bad."
    )


@preference_losses.register("kto", params=WeightedParams, required_columns=REFERENCE | {"kl_log_ratio"})
def kto(inputs: PreferenceInputs, params: WeightedParams) -> Preferences:
    """w_good·(1 − σ(β(r − z))) for good answers, w_bad·(1 − σ(β(z − r))) for bad ones, r = log(π / π_ref).

    z estimates KL(π ‖ π_ref) from answers to other prompts of the mini-batch; it is at least 0 and has no gradient.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    return _weighted(inputs, params, inputs.kl)


@preference_losses.register("apo-zero-unpaired", params=WeightedParams, required_columns=REFERENCE)
def apo_zero_unpaired(inputs: PreferenceInputs, params: WeightedParams) -> Preferences:
    """``kto`` with z = 0, which needs no estimate of the KL.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266 (eq. 7, for single answers).
    """
    return _weighted(inputs, params, 0.0)


def _weighted(inputs: PreferenceInputs, params: WeightedParams, kl: float) -> Preferences:
    good, bad = (params.beta * side.log_ratio for side in (inputs.chosen, inputs.rejected))
    level = params.beta * kl
    losses = torch.cat(
        [params.desirable_weight * (level - good).sigmoid(), params.undesirable_weight * (bad - level).sigmoid()]
    )
    return Preferences(losses, good, bad)
