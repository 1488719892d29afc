"""Losses of the critic, and how well it explains the returns."""

from __future__ import annotations

import torch
from pydantic import Field

from rlcore.algorithms.registries import value_losses
from rlcore.algorithms.sequences import record_mean, trained_mask
from rlcore.batch import Batch
from rlcore.config import Config
from rlcore.metrics import Metrics


class ClippedValueParams(Config):
    """Parameters of ``clipped``."""

    clip_range: float | None = Field(
        0.5, gt=0, description="The new value moves at most this far from the old one; null does not clip."
    )


@value_losses.register("clipped", params=ClippedValueParams)
def clipped(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    params: ClippedValueParams,
) -> tuple[torch.Tensor, Metrics]:
    """½·max((v − R)², (clip(v, v_old ± c) − R)²): squared error that does not reward moving far in one batch.

    Source: PPO's reference implementation; Engstrom et al. 2020, arXiv:2005.12729 (§2); ½: GAE, arXiv:1506.02438.
    """
    metrics = Metrics()
    losses = (values - returns).square()
    if params.clip_range is not None:
        near = values.clamp(old_values - params.clip_range, old_values + params.clip_range)
        bounded = (near - returns).square()
        record_mean(metrics, "vf_clipfrac", bounded > losses, mask)
        losses = torch.maximum(losses, bounded)
    record_mean(metrics, "vpred_mean", values, mask)
    return losses / 2, metrics


def explained_variance(batch: Batch) -> float:
    """1 − Var(returns − values) / Var(returns) over all trained tokens; 0 for returns without variance.

    1 is a perfect critic, 0 one no better than a constant. Reads ``loss_mask``, ``values`` and ``returns``.
    """
    mask = trained_mask(batch)
    returns, values = batch.flat("returns")[mask].double(), batch.flat("values")[mask].double()
    if len(returns) < 2 or float(returns.var()) == 0:
        return 0.0
    return 1 - float((returns - values).var() / returns.var())
