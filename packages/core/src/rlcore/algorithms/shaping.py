"""Rewards on tokens: where a score stands, and what over-long answers cost."""

from __future__ import annotations

import torch
from pydantic import Field

from rlcore.algorithms.sequences import trained_mask
from rlcore.batch import Batch
from rlcore.config import Config


def terminal_rewards(batch: Batch, scores: torch.Tensor) -> torch.Tensor:
    """Token rewards ``[T]`` fp32 that hold each score ``[B]`` at the last trained token of its sequence.

    In a sequence without trained tokens it stands at the last token, where it still counts for the group's baseline.
    """
    mask = trained_mask(batch)
    lengths = batch.lengths
    ends = lengths.cumsum(0)
    position = torch.arange(1, len(mask) + 1, device=mask.device)
    latest = torch.where(mask, position, 0).cummax(0).values  # 1 + the last trained token so far, 0 before any
    filled = lengths > 0
    last = (ends[filled] - 1).to(mask.device)
    start = (ends - lengths)[filled].to(mask.device)
    target = torch.where(latest[last] > start, latest[last] - 1, last)
    rewards = torch.zeros(len(mask), device=mask.device)
    rewards[target] = scores.to(rewards)[filled.to(scores.device)]
    return rewards


class OverlongSettings(Config):
    """Soft punishment of answers that come close to the length limit."""

    buffer: int = Field(4096, gt=0, description="Tokens before the limit over which the punishment grows.")
    factor: float = Field(1.0, ge=0, description="Punishment at the limit.")


def overlong_punishment(response_lengths: torch.Tensor, max_length: int, settings: OverlongSettings) -> torch.Tensor:
    """``min(−(len − (max_length − buffer)) / buffer · factor, 0)``, ``[B]`` fp32, to be added to the scores.

    Source: DAPO, Yu et al. 2025, arXiv:2503.14476 (eq. 13).
    """
    excess = response_lengths - (max_length - settings.buffer)
    return (-excess / settings.buffer * settings.factor).clamp(max=0).float()
