"""Changed copies of a model folder, for tests of code that reads and writes model folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

ONE_LAYER = {"num_hidden_layers": 1, "layer_types": None, "max_window_layers": 1}


def edited(
    source: Path,
    target: Path,
    *,
    config: Mapping[str, Any] | None = None,
    weights: Callable[[Tensors], None] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Copy the model folder ``source`` to ``target`` and change it.

    Args:
        config: keys to set in ``config.json``.
        weights: changes the tensors of the weight file in place.
        files: texts of files to write, by name.
    """
    shutil.copytree(source, target)
    if config is not None:
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(config)))
    if weights is not None:
        file = target / "model.safetensors"
        tensors = load_file(file)
        weights(tensors)
        save_file(tensors, file, {"format": "pt"})
    for name, text in (files or {}).items():
        (target / name).write_text(text)
    return target


def precisions(folder: Path) -> dict[str, torch.dtype]:
    """Return the precision of every tensor in a model folder with one weight file."""
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


def half_precision(tensors: Tensors) -> None:
    """Convert matrices to bfloat16."""
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.dim() > 1})


def _other_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def _integers(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int64)


def two_labels(tensors: Tensors) -> None:
    """Give the scalar head a second row."""
    tensors["score.weight"] = tensors["score.weight"].repeat(2, 1)


def _generation(text: str) -> dict[str, Any]:
    return {"files": {"generation_config.json": text}}


# by case: a pattern of the error message, and the changes to a valid folder
WRONG_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "a layer too many": (r"model\.layers\.1\.", {"config": ONE_LAYER}),
    "a head that is tied": (
        r"lm_head\.weight .*tie_word_embeddings",
        {"config": {"tie_word_embeddings": True}, "weights": _other_head},
    ),
    "integers": (r"model\.norm\.weight holds integers \(I64\)", {"weights": _integers}),
    "an adapter": ("complete weights and an adapter", {"files": {"adapter_config.json": "{}"}}),
    "quantised": (r"quantised weights \(gptq\)", {"config": {"quantization_config": {"quant_method": "gptq"}}}),
    "no end token": (r"generation_config\.json: eos_token_id is \[\]", _generation('{"eos_token_id": []}')),
    "an end token of no token": ("eos_token_id is 1000000", {"config": {"eos_token_id": 10**6}}),
    "settings cut off": (r"generation_config\.json is damaged", _generation('{"eos_token_id": [1')),
}
