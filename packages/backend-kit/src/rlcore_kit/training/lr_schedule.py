"""The learning-rate schedule that every training engine follows."""

from __future__ import annotations

import math

from rlcore.engines.settings import OptimSettings
from rlcore.errors import EngineError


def check_schedule(settings: OptimSettings) -> None:
    """Raise `EngineError` if the schedule needs its number of steps and does not have it."""
    if settings.schedule != "constant" and settings.total_steps is None:
        raise EngineError(f"optim.schedule {settings.schedule!r} needs optim.total_steps, the length of the schedule")


def learning_rate(step: int, settings: OptimSettings) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0).

    It rises linearly to the peak at step ``warmup_steps - 1``, and then falls so that it would reach ``min_lr_ratio``
    times the peak at step ``total_steps``.
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
