"""Random adapters of a model, as training engines export them, and the model into which they are merged."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

PREFIX = "base_model.model."


def random_adapters(folder: Path, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Return adapters of every linear layer but the head, with the scaling in B (`TrainEngine.export_adapters`)."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in _loaded(folder).named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            found[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) / 4
            found[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) / 4
    return found


@torch.no_grad()
def merged_model(folder: Path, adapters: dict[str, torch.Tensor]) -> Any:
    """Return the model of transformers that computes with ``adapters``, in fp32."""
    model = _loaded(folder)
    for name, down in adapters.items():
        if name.endswith(".lora_A.weight"):
            layer = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
            layer.weight += adapters[name.replace("lora_A", "lora_B")] @ down
    return model


def _loaded(folder: Path) -> Any:
    transformers: Any = import_module("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
