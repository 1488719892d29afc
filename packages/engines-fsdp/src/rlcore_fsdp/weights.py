"""Whole weights under their Hugging Face names: streamed in buckets, and written as a model folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rlcore.engines import WeightBucket
from rlcore_fsdp import lora, sharding
from rlcore_fsdp.loading import quiet


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers (shards under FSDP) in the model's order, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def full_weights(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights, whole, on ``device``, floating-point ones as ``dtype``; all ranks iterate to the end.

    Adapters are merged into them. Whatever already is all that is not copied.
    """
    adapted = dict(lora.adapted_layers(model))
    for name, tensor in named_weights(model):
        if lora.is_adapter(name):
            continue
        whole = sharding.full(tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype))
        layer, inside, kind = name.rpartition(".base_layer.")
        if inside and kind == "weight":
            whole = lora.merged(adapted[layer], whole)
        yield f"{layer}.{kind}" if inside else name, whole


def buckets(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[WeightBucket]:
    """Group tensors up to ``bucket_bytes``; a larger tensor stands alone."""
    held: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if held and size + tensor.nbytes > bucket_bytes:
            yield WeightBucket(tuple(held))
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield WeightBucket(tuple(held))


def write_model(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    path: Path,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write ``weights`` with the model's configuration to the folder ``path``, which other files may stand in already.

    Everything is written beside the folder first; ``write_more`` adds what it likes to it. A new folder appears in one
    piece; in an existing one ``config.json`` goes first and comes back last, so that a folder with a configuration is
    complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with quiet():
            model.save_pretrained(temporary, state_dict=weights)
            model.config.dtype = str(dtype).removeprefix("torch.")  # of what was written, not of the master weights
            model.config.save_pretrained(temporary)
        if write_more is not None:
            write_more(temporary)
        if not path.exists():
            temporary.rename(path)
            return
        (path / "config.json").unlink(missing_ok=True)
        for stale in path.glob("model*.safetensors*"):
            stale.unlink()
        shutil.rmtree(path / lora.FOLDER, ignore_errors=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(path / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
