"""What of an engine is in its checkpoints, and the optimizer states that come back from them.

With adapters that is what is trained. The frozen weights come from the model's folder; a checkpoint holds a number by
which it knows them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlcore.checkpoint.rank_files import RankPart
from rlcore.errors import CheckpointError
from rlcore_fsdp import checkpoint, sharding
from rlcore_fsdp.checkpoint import Frozen, Lora, Manifest
from rlcore_fsdp.lora import adapted_layers, trained_parameters
from rlcore_fsdp.weights import named_weights

MOMENTS = ("exp_avg", "exp_avg_sq")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def collect(model: nn.Module, optimizer: torch.optim.Optimizer | None, rank: int) -> tuple[RankPart, dict[str, Any]]:
    """What this rank writes, as live views, and entries of the manifest that are the same on all ranks."""
    adam = adam_states(model, optimizer)
    tensors = {f"weight/{name}": tensor for name, tensor in kept_weights(model)}
    tensors |= {f"{moment}/{name}": state[moment] for name, state in adam.items() for moment in MOMENTS}
    facts = {
        "optimizer": optimizer is not None,
        "adam_steps": {name: float(state["step"]) for name, state in adam.items()},
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
    }
    return checkpoint.part(tensors, rank), facts


def kept_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights (shards under FSDP) that a checkpoint holds: all, or those that are trained beside frozen ones."""
    if any(True for _ in adapted_layers(model)):
        return ((name, parameter.detach()) for name, parameter in trained_parameters(model))
    return named_weights(model)


def frozen_number(model: nn.Module, rank: int, gather: Callable[[Any], list[Any]]) -> str:
    """A number for the weights of ``model`` that checkpoints do not hold, whatever the number of ranks; collective.

    It is the sum of their bits as integers, modulo 2^64.
    """
    kept = {name for name, _ in kept_weights(model)}
    total = 0
    for name, tensor in named_weights(model):
        own = checkpoint.piece(tensor, rank)
        if name not in kept and own.writes:
            bits = own.local.detach().contiguous().view(_INTEGERS[own.local.element_size()])
            total += int(bits.sum(dtype=torch.int64))
    return f"{sum(gather(total)) % 2**64:016x}"


def check_base(path: Path, manifest: Manifest, lora: Lora | None, frozen: Frozen | None) -> None:
    """Compare what a checkpoint says of adapters and frozen weights with the engine's own.

    Raises:
        CheckpointError: one trained whole weights and the other adapters, or these beside others, or otherwise scaled.
    """
    if manifest.lora != lora:
        there, here = (_described(one) for one in (manifest.lora, lora))
        raise CheckpointError(f"{path} was saved by an engine that trains {there}; this one trains {here}")
    theirs = manifest.frozen
    if theirs is not None and frozen is not None and theirs.dtype == frozen.dtype and theirs != frozen:
        raise CheckpointError(f"{path} holds adapters for other frozen weights than those of model.path here")


def _described(lora: Lora | None) -> str:
    return "whole weights" if lora is None else f"adapters of rank {lora.rank} and alpha {lora.alpha:g}"


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
