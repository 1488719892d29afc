"""Building an engine's model: the plain module, or shards that rank 0 fills."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from rlcore.engines import TrainEngineSpec
from rlcore.errors import EngineError
from rlcore_fsdp import lora, sharding
from rlcore_fsdp.attention import IMPLEMENTATION
from rlcore_fsdp.packed_model import PackedModel
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.model_folder.loading import empty_model, load_model
from rlcore_kit.training.process_group import gather_objects, own_rank


def needs_sharding(settings: FSDPSettings, device: torch.device, world: int, mixed_precision: bool) -> bool:
    """Return whether FSDP2 has anything to do; if not, the plain module is faster."""
    return world > 1 or mixed_precision or (settings.offload_params and device.type == "cuda")


def build_model(
    spec: TrainEngineSpec,
    settings: FSDPSettings,
    config: Any,
    *,
    device: torch.device,
    world: int,
    param_dtype: torch.dtype,
    master_dtype: torch.dtype,
) -> PackedModel:
    """Build the model with its weights on ``device``: sharded over ``world`` ranks, or the plain module; collective.

    Args:
        config: configuration of transformers.
        param_dtype: precision of forward and backward.
        master_dtype: precision of the weights that the optimizer updates.

    Raises:
        EngineError: on all ranks, if the model cannot be loaded or divided.
    """
    lora_settings = settings.lora

    def with_adapters(model: PreTrainedModel) -> PreTrainedModel:
        if lora_settings is not None:
            lora.add_adapters(model, lora_settings, spec.head, master_dtype, spec.seed)
        return model

    def loaded(dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
        return load_model(spec.model, config, spec.head, dtype, spec.seed, IMPLEMENTATION, spec.new_head)

    if not needs_sharding(settings, device, world, master_dtype != param_dtype):
        if settings.replicate > 1:
            raise EngineError(f"replicate {settings.replicate} needs that many processes; this is the only one")
        model = with_adapters(loaded(param_dtype))
        return PackedModel(model.to(device), spec.head, settings.logits_chunk)  # type: ignore[arg-type]
    mesh = sharding.make_mesh(device, settings.replicate)
    source, error = None, None
    if own_rank() == 0:
        try:
            source = with_adapters(loaded("auto"))
        except EngineError as problem:
            error = str(problem)
    if error := gather_objects(error)[0]:
        raise EngineError(error)
    frozen_dtype = param_dtype if lora_settings else master_dtype
    model = with_adapters(empty_model(spec.model, config, spec.head, frozen_dtype, IMPLEMENTATION))
    root = PackedModel(model, spec.head, settings.logits_chunk)
    sharding.shard(root, mesh, settings, param_dtype, getattr(torch, settings.reduce_dtype))
    home = torch.device("cpu") if settings.offload_params else device
    sharding.fill(root, source, mesh, device, home)
    return root
