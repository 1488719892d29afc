"""The learning-rate schedule that every training engine follows."""

from __future__ import annotations

import math

from rlcore.engines.settings import OptimSettings
from rlcore.errors import EngineError


def check_schedule(settings: OptimSettings) -> None:
    """Raise `EngineError` if the schedule needs its number of steps and does not have it."""
    if settings.total_steps is not None:
        return
    if settings.schedule != "constant":
        raise EngineError(f"optim.schedule {settings.schedule!r} needs optim.total_steps, the length of the schedule")
    if settings.warmup_ratio:
        raise EngineError(
            f"optim.warmup_ratio={settings.warmup_ratio:g} is a share of optim.total_steps, which is not set"
        )


def learning_rate(step: int, settings: OptimSettings) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0).

    It rises linearly to the peak at step ``warmup - 1``, and then falls so that it would reach ``min_lr_ratio``
    times the peak at step ``total_steps``.
    """
    warmup = settings.warmup
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    assert settings.total_steps is not None
    length = max(1, settings.total_steps - warmup)
    progress = min(1.0, (step - warmup) / length)
    fall = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * fall)
