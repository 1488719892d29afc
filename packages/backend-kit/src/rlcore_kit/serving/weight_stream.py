"""The stream of weight buckets of one update, and its comparison with the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError

Shapes = Mapping[str, tuple[int, ...]]


def with_device(buckets: Iterable[WeightBucket]) -> tuple[torch.device, Iterator[WeightBucket]]:
    """Return the device of the first bucket, and a stream of all ``buckets``.

    The stream keeps no reference to a bucket that it has yielded, so at most two exist at a time.

    Raises:
        EngineError: there is no bucket.
    """
    iterator = iter(buckets)
    first = next(iterator, None)
    if first is None:
        raise EngineError("the weight update is empty")
    return first.tensors[0][1].device, _chained([first], iterator)


def _chained(first: list[WeightBucket], rest: Iterator[WeightBucket]) -> Iterator[WeightBucket]:
    yield first.pop()
    yield from rest


def shapes_of(model: str) -> Shapes:
    """Return names and shapes of all tensors in a model's folder; empty if this process cannot read it."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in Path(model).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    return shapes


def checked(buckets: Iterable[WeightBucket], shapes: Shapes) -> Iterator[WeightBucket]:
    """Yield ``buckets`` after comparing them with the names and ``shapes`` of the model's folder.

    Servers do not: SGLang (0.5) skips tensors that it does not know, keeps old weights where tensors are missing, and
    ends at a tensor of another shape.

    Raises:
        EngineError: a tensor is unknown, has another shape, or is missing at the end.
    """
    missing = set(shapes)
    for bucket in buckets:
        if shapes:
            tensors = tuple(pair for pair in bucket.tensors if pair[0] in shapes or pair[0] != _HEAD)
            for name, tensor in tensors:
                if name not in shapes:
                    raise EngineError(f"the weight update holds {name}, which the model does not have")
                if tuple(tensor.shape) != shapes[name]:
                    raise EngineError(
                        f"the weight update holds {name} of shape {list(tensor.shape)} instead of {list(shapes[name])}"
                    )
            missing -= {name for name, _ in tensors}
            bucket = WeightBucket(tensors)
        if bucket.tensors:
            yield bucket
    if missing:
        named = ", ".join(sorted(missing)[:3]) + (" …" if len(missing) > 3 else "")
        raise EngineError(f"the weight update lacks {len(missing)} of {len(shapes)} tensors: {named}")


_HEAD = "lm_head.weight"
"""Missing in folders if it is tied to the embedding; trainers may send it all the same."""
