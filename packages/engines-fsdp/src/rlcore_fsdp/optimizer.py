"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from rlcore.engines import OptimSettings
from rlcore.errors import EngineError


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019); vectors (biases, norms) are not decayed."""
    if settings.schedule != "constant" and settings.total_steps is None:
        raise EngineError(f"optim.schedule {settings.schedule!r} needs optim.total_steps, the length of the schedule")
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if params
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(step: int, settings: OptimSettings) -> float:
    """The rate of optimizer step ``step`` (from 0).

    It rises linearly to the peak at step ``warmup_steps - 1``, and falls from there so that ``min_lr_ratio`` would be
    reached at step ``total_steps``.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    assert settings.total_steps is not None
    length = max(1, settings.total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / length)
    fall = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * fall)
