"""Estimate of the memory that a training step takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rlcore.engines.settings import Head
from rlcore.engines.step_memory import StepMemory
from rlcore_fsdp import sharding
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.training.logprob_head import chunk_size
from rlcore_kit.training.memory import activation_bytes, free_memory, logits_bytes, place_of


def step_memory(
    model: PreTrainedModel,
    head: Head,
    settings: FSDPSettings,
    device: torch.device,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer | None,
    sharded: bool,
) -> StepMemory:
    """Estimate what a training step takes; see `rlcore_kit.training.memory`.

    Args:
        device: device of the forward pass.
        dtype: precision of forward and backward.
        optimizer: None for a frozen model.
        sharded: whether parameters are shards, which are gathered layer by layer.
    """
    config, trained = model.config, optimizer is not None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]] if optimizer else []
    fixed = 0
    if head == "policy":
        vocabulary = config.get_text_config().vocab_size
        chunk = chunk_size(settings.logits_chunk, device, vocabulary)
        fixed += logits_bytes(config, chunk, trained=model.get_output_embeddings().weight.requires_grad)
    elsewhere = device.type == "cuda" and settings.offload_params  # gradients and moments are in host memory then
    if not elsewhere:
        fixed += sum(sharding.local(parameter).nbytes for parameter in parameters)
    if next(model.parameters()).device != device and not elsewhere:  # offloaded until they are used
        fixed += sum(sharding.local(parameter).nbytes for parameter in model.parameters())
    if sharded:
        fixed += _gathered(model, dtype)
        if not settings.reduce_every_micro_batch:  # full gradients are kept between micro-batches
            fixed += 4 * sum(parameter.numel() for parameter in parameters)
    return StepMemory(
        place=place_of(device),
        free=free_memory(device),
        later=0 if elsewhere or settings.offload_optimizer else _moments(parameters, optimizer),
        fixed=fixed,
        per_token=activation_bytes(config, dtype.itemsize, trained=trained, recompute=settings.gradient_checkpointing),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _moments(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> int:
    if optimizer is None or optimizer.state:
        return 0
    return 2 * sum(sharding.local(parameter).nbytes for parameter in parameters)


def _gathered(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Return the bytes of the parameters outside of layers, and of two layers: the current one and the next one."""
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in sharding.decoder_layers(model)]
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(layers)
    return dtype.itemsize * (others + 2 * max(layers))
