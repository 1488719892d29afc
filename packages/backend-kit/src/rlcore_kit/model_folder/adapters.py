"""Adapters in PEFT's format: names of their matrices, and the folder that ``peft.PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import save_file

from rlcore.engines import LoRASettings
from rlcore.errors import EngineError

PREFIX = "base_model.model."
"""Prefix of every name in PEFT's files: the modules that PEFT wraps a model in."""
SCORE = "score"
"""Name of the head of value and score models, all of which is trained."""
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
"""PEFT's names of the tasks of models with a scalar head, by the ends of transformers' class names."""


def peft_config(settings: LoRASettings, targets: Iterable[str]) -> Any:
    """Return PEFT's ``LoraConfig`` of adapters for the layers whose names end in ``targets``.

    Raises:
        EngineError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise EngineError("the option lora needs PEFT, which is not installed: pip install 'rlcore[lora]'") from error
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float is fine
        lora_dropout=settings.dropout,
        target_modules=list(targets),
    )


def first_matrix(layer: str, rank: int, width: int, seed: int) -> torch.Tensor:
    """Return the matrix A ``[rank, width]`` with which the adapter of ``layer`` starts, fp32 on the CPU.

    It is uniform as in the paper's code, and the same in every engine and layout.

    Args:
        layer: name of the layer in transformers' model.
        seed: of the run.
    """
    generator = torch.Generator().manual_seed((seed + crc32(layer.encode())) % 2**63)
    matrix = torch.empty(rank, width)
    torch.nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)
    return matrix


def write_adapters(
    weights: Mapping[str, torch.Tensor],
    settings: LoRASettings,
    targets: Iterable[str],
    folder: Path,
    *,
    base: str,
    model_class: str,
) -> None:
    """Write the new folder ``folder``.

    Args:
        weights: contents of PEFT's file, on the CPU. A scalar head among them is listed as saved completely.
        targets: last parts of the names of the adapted layers.
        base: folder or name of the model that the adapters belong to.
        model_class: name of transformers' class of that model.
    """
    config = peft_config(settings, targets)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.task_type = next((task for end, task in _TASKS.items() if model_class.endswith(end)), "CAUSAL_LM")
    if any(name.startswith(f"{PREFIX}{SCORE}.") for name in weights):
        config.modules_to_save = [SCORE]
    config.target_modules = sorted(config.target_modules)  # PEFT's set has another order in every process
    folder.mkdir()
    save_file(dict(weights), folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
