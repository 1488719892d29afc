"""Estimate of the memory that a training step takes; imports no megatron-core."""

from __future__ import annotations

from typing import Any

import torch

from rlcore.engines.step_memory import StepMemory
from rlcore_kit.training.logprob_head import chunk_size
from rlcore_kit.training.memory import activation_bytes, free_memory, logits_bytes, place_of
from rlcore_megatron.settings import MegatronSettings


def step_memory(
    config: Any,
    settings: MegatronSettings,
    device: torch.device,
    itemsize: int,
    *,
    parameters: int,
    data_parallel: int,
    trained: int,
    stepped: bool,
) -> StepMemory:
    """Estimate what a training step takes; see `rlcore_kit.training.memory`.

    Gradient buffers exist from the start and do not count. A pipeline stage holds a part of the layers, but as many
    micro-batches as there are stages, so that its activations are those of all layers of one micro-batch.

    Args:
        config: configuration of transformers.
        itemsize: bytes per element in forward and backward.
        parameters: number of parameters that this process holds.
        data_parallel: number of data-parallel ranks.
        trained: number of those parameters that the optimizer updates; 0 without one.
        stepped: whether the optimizer has made a step, so that its states exist.
    """
    tensor, stages, chunks = settings.tensor_parallel, settings.pipeline_parallel, settings.virtual_pipeline
    columns = -(-config.get_text_config().vocab_size // tensor)
    logits = logits_bytes(config, chunk_size(settings.logits_chunk, device, columns), trained=trained > 0) // tensor
    per_token = activation_bytes(
        config, itemsize, trained=trained > 0, recompute=settings.recompute == "full", tensor_parallel=tensor
    )
    if chunks > 1:  # the interleaved schedule holds some chunks of later micro-batches too
        per_token += per_token * (stages - 1) // (stages * chunks)
    moments = 8 * trained // (data_parallel if settings.distributed_optimizer else 1)
    return StepMemory(
        place=place_of(device),
        free=free_memory(device),
        later=0 if not trained or stepped or settings.offload_optimizer else moments,
        fixed=logits,
        per_token=-(-per_token // settings.context_parallel),
        parameters=parameters if settings.model_parallel * settings.expert_parallel == 1 else None,
    )
