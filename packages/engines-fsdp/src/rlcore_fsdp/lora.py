"""Low-rank adapters (LoRA: Hu et al., 2021, https://arxiv.org/abs/2106.09685) of frozen linear layers, by PEFT.

The model stays the Hugging Face one; PEFT wraps every adapted layer, whose weights are then named
``….base_layer.weight``. Exported tensors have the names that they would have without adapters, or those of PEFT's
files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlcore.boundary import boundary
from rlcore.engines import LoRASettings
from rlcore.engines.settings import Head
from rlcore.errors import EngineError
from rlcore_fsdp import sharding
from rlcore_kit.model_folder import adapters
from rlcore_kit.model_folder.adapters import PREFIX, SCORE, first_matrix, peft_config

ADAPTER = "default"
"""PEFT's name for the only adapter of every layer."""


def add_adapters(model: PreTrainedModel, settings: LoRASettings, head: Head, dtype: torch.dtype, seed: int) -> None:
    """Add adapters of ``dtype``, initialised from ``seed``, to the selected layers of ``model`` (also a meta model).

    B starts at zero, so that the outputs of the model stay the same; A is uniform as in the paper's code.

    Raises:
        EngineError: PEFT is not installed, or the model has no such layers.
    """
    config = peft_config(settings, _targets(model, settings))
    from peft import inject_adapter_in_model

    with boundary(f"{type(model).__name__} cannot have adapters", EngineError), torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for name, layer in adapted_layers(model):
        if not isinstance(layer.base_layer, nn.Linear):  # PEFT also adapts fused experts
            raise EngineError(
                f"{name} of {type(model).__name__} is no linear layer and cannot have adapters; list the layers "
                "to adapt in lora.target_modules (q_proj, k_proj, v_proj, o_proj …)"
            )
    for name, layer in adapted_layers(model):
        device = layer.base_layer.weight.device
        down, up = (torch.zeros(part[ADAPTER].weight.shape, device=device) for part in (layer.lora_A, layer.lora_B))
        if device.type != "meta":
            down.copy_(first_matrix(name, len(down), down.shape[1], seed))
        layer.lora_A[ADAPTER].weight = nn.Parameter(down.to(dtype))
        layer.lora_B[ADAPTER].weight = nn.Parameter(up.to(dtype))
    if head != "policy":
        model.get_submodule(SCORE).to(dtype)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's layers, with the names of the wrapped layers in the model without adapters."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name, module


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are trained: all, or the adapters of a model that has some and its scalar head."""
    adapted = any(True for _ in adapted_layers(model))
    for name, parameter in model.named_parameters():
        if not adapted or is_adapter(name) or name.startswith(f"{SCORE}."):
            yield name, parameter


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Have adapted layers compute W x alone while the context lasts."""
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        # what PEFT's enable_adapters sets, which also changes the parameters' requires_grad
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_adapter(name: str) -> bool:
    """Return whether the parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return W + alpha / rank · B A for the full ``weight`` W of ``layer``, computed in fp32; collective."""
    down, up = _matrices(layer, weight.device)
    return torch.addmm(weight.float(), up, down, alpha=layer.scaling[ADAPTER]).to(weight.dtype)


def scaled_adapters(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield full adapters, named and scaled as in `TrainEngine.export_adapters`; all ranks iterate to the end."""
    for name, layer in adapted_layers(model):
        down, up = _matrices(layer, device)
        yield f"{PREFIX}{name}.lora_A.weight", down.to(dtype)
        yield f"{PREFIX}{name}.lora_B.weight", (up * layer.scaling[ADAPTER]).to(dtype)


def full_adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the contents of PEFT's file for ``model``, in host memory; collective."""
    return {
        PREFIX + name.replace(f".{ADAPTER}.", "."): sharding.full(parameter.detach()).cpu()
        for name, parameter in trained_parameters(model)
    }


def write_adapters(
    weights: dict[str, torch.Tensor], model: PreTrainedModel, settings: LoRASettings, base: str, folder: Path
) -> None:
    """Write the new folder ``folder``, which ``peft.PeftModel.from_pretrained`` loads onto ``base``."""
    adapters.write_adapters(
        weights, settings, _targets(model, settings), folder, base=base, model_class=type(model).__name__
    )


def _matrices(layer: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the full A and B of ``layer`` in fp32; collective."""
    down, up = (sharding.full(part[ADAPTER].weight.detach().to(device)) for part in (layer.lora_A, layer.lora_B))
    return down.float(), up.float()


def _targets(model: PreTrainedModel, settings: LoRASettings) -> list[str]:
    """Return the last parts of the names of the layers that get adapters."""
    head = model.get_output_embeddings()
    known = {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    } - {SCORE}
    wanted = set(settings.target_modules or known)
    if missing := sorted(wanted - known):
        raise EngineError(
            f"lora.target_modules names {', '.join(missing)}, but the linear layers of {type(model).__name__} that can "
            f"have adapters are {', '.join(sorted(known))}"
        )
    return sorted(wanted)
