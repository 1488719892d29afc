"""Losses of reward models: comparisons of two answers, and regression on labels of answers or of their steps.

``s`` is a score that the model gives at a token; losses are computed in fp64.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rlcore.algorithms.registries import RewardLossInputs, reward_losses
from rlcore.config import Config
from rlcore.config.registry import NoParams
from rlcore.errors import BatchError
from rlcore.metrics import Metrics


class BradleyTerryParams(Config):
    """Parameters of ``bradley_terry``."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Probability that chosen and rejected are swapped.")
    centering: float = Field(
        0.0, ge=0, description="Weight c of the term that keeps the mean score of a pair near 0; 0.01 is usual."
    )


@reward_losses.register(
    "bradley_terry", params=BradleyTerryParams, required_columns={"side", "margin"}, together="pair"
)
def bradley_terry(inputs: RewardLossInputs, params: BradleyTerryParams) -> tuple[torch.Tensor, Metrics]:
    """−(1 − ε)·logσ(d) − ε·logσ(−d) + c·(s_c + s_r)² with d = s_c − s_r − m; m is the margin of the pair.

    Source: Bradley and Terry 1952, Biometrika 39; margin: Llama 2, Touvron et al. 2023, arXiv:2307.09288 (eq. 2);
    centering: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    side, pair, scores = inputs.columns["side"], inputs.columns["pair"], inputs.scores.double()
    chosen, rejected = ((side == number).nonzero().squeeze(-1) for number in (0, 1))
    chosen, rejected = (rows[pair[rows].argsort()] for rows in (chosen, rejected))
    if not torch.equal(pair[chosen], pair[rejected]):
        raise BatchError("a pair is not one chosen and one rejected score: 'pair', 'side' and 'loss_mask' disagree")
    difference = scores[chosen] - scores[rejected]
    d = difference - inputs.columns["margin"][chosen]
    losses = -(1 - params.label_smoothing) * logsigmoid(d) - params.label_smoothing * logsigmoid(-d)
    losses = losses + params.centering * (scores[chosen] + scores[rejected]).square()
    metrics = Metrics()
    record(metrics, "accuracy", (difference > 0).double())
    record(metrics, "margin", difference)
    record(metrics, "score_chosen", scores[chosen])
    record(metrics, "score_rejected", scores[rejected])
    return losses, metrics


@reward_losses.register("mse", required_columns={"labels"})
def mse(inputs: RewardLossInputs, params: NoParams) -> tuple[torch.Tensor, Metrics]:
    """(s − y)²: scores become estimates of the labels.

    Source: HelpSteer, Wang et al. 2023, arXiv:2311.09528 (regression on attributes).
    """
    scores, labels = inputs.scores.double(), inputs.columns["labels"].double()
    metrics = Metrics()
    record(metrics, "absolute_error", (scores - labels).abs())
    record(metrics, "score", scores)
    return (scores - labels).square(), metrics


@reward_losses.register("bce", required_columns={"labels"}, traits={"probability_labels"})
def bce(inputs: RewardLossInputs, params: NoParams) -> tuple[torch.Tensor, Metrics]:
    """−y·logσ(s) − (1 − y)·logσ(−s): s is the log-odds of being right.

    Source: outcome and process supervision, Lightman et al. 2023, arXiv:2305.20050.
    """
    scores, labels = inputs.scores.double(), inputs.columns["labels"].double()
    metrics = Metrics()
    record(metrics, "accuracy", ((scores > 0) == (labels > 0.5)).double())
    record(metrics, "score", scores)
    return binary_cross_entropy_with_logits(scores, labels, reduction="none"), metrics


def record(metrics: Metrics, name: str, values: torch.Tensor) -> None:
    """Record the mean of ``values`` ``[N]``, weighted by their number."""
    metrics.mean(name, values.detach().sum() / max(len(values), 1), len(values))
