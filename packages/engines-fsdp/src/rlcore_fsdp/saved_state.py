"""What of an engine is in its checkpoints, and the optimizer states that come back from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlcore.checkpoint.rank_files import RankPart
from rlcore_fsdp import checkpoint, sharding
from rlcore_fsdp.weights import named_weights

MOMENTS = ("exp_avg", "exp_avg_sq")


def collect(model: nn.Module, optimizer: torch.optim.Optimizer | None, rank: int) -> tuple[RankPart, dict[str, Any]]:
    """What this rank writes, as live views, and facts that are the same on all ranks."""
    adam = adam_states(model, optimizer)
    tensors = {f"weight/{name}": tensor for name, tensor in named_weights(model)}
    tensors |= {f"{moment}/{name}": state[moment] for name, state in adam.items() for moment in MOMENTS}
    facts = {
        "format": checkpoint.FORMAT,
        "optimizer": optimizer is not None,
        "adam_steps": {name: float(state["step"]) for name, state in adam.items()},
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    return checkpoint.part(tensors, rank), facts


def adam_states(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, dict[str, torch.Tensor]]:
    """By the parameters' names; none before the first step."""
    if optimizer is None:
        return {}
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def restore_adam_states(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Mapping[str, float], values: Mapping[str, torch.Tensor]
) -> None:
    """Put this rank's rows of the moments, from ``values``, in place of whatever states there are."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, step in steps.items():
        parameter = parameters[name]
        state = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        for moment, tensor in state.items():
            sharding.local(tensor).copy_(values[f"{moment}/{name}"])
        state["step"] = torch.tensor(step, dtype=torch.float32, device=sharding.local(parameter).device)
        optimizer.state[parameter] = state
