"""AdamW."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from rlcore.engines import OptimSettings
from rlcore_kit.training.lr_schedule import check_schedule


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter, 2019) without weight decay for vectors (biases, norms).

    Raises:
        EngineError: the learning-rate schedule lacks its number of steps.
    """
    check_schedule(settings)
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
