"""Full weights under their Hugging Face names, streamed in buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from rlcore.engines import WeightBucket
from rlcore_fsdp import lora, sharding


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and persistent buffers (shards under FSDP) in the model's order, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def full_weights(
    model: nn.Module, dtype_of: Callable[[str], torch.dtype], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the full weights of the model on ``device``; all ranks iterate to the end.

    Floating-point weights have the precision ``dtype_of(name)``. Adapters are merged into them. A tensor that already
    has this device, precision and shape is not copied.
    """
    adapted = dict(lora.adapted_layers(model))
    for name, tensor in named_weights(model):
        if lora.is_adapter(name):
            continue
        layer, inside, kind = name.rpartition(".base_layer.")
        plain = f"{layer}.{kind}" if inside else name
        full = sharding.full(tensor.to(device, dtype_of(plain) if tensor.is_floating_point() else tensor.dtype))
        if inside and kind == "weight":
            full = lora.merged(adapted[layer], full)
        yield plain, full


def buckets(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[WeightBucket]:
    """Group tensors into buckets of up to ``bucket_bytes``; a larger tensor is alone in its bucket."""
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
