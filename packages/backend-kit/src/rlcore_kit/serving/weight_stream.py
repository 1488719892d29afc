"""The stream of weight buckets of one update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError


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
