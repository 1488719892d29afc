"""`Supervised`: replicas that get the current weights when they come back, from a copy in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rlcore.engines import RolloutEngine, WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.serving.replicas import Replicas

_LOOK_S = 0.2


class Supervised(Replicas):
    """`Replicas` over servers that are started anew when they die.

    An update waits for one of them if all are being started.

    Args:
        factories: build an engine, and start its server where that is ours to do.
        keep: whether a copy of the current weights is kept, in host memory, for servers that come back.
        options: of `Replicas`.
    """

    def __init__(
        self, factories: Sequence[Callable[[], RolloutEngine]], *, keep: bool, rejoin_timeout_s: float, **options: Any
    ) -> None:
        self._kept: tuple[int, list[WeightBucket]] | None = None
        self._keep, self._patience_s = keep, rejoin_timeout_s
        refresh = self._give if keep else None
        super().__init__(factories, refresh=refresh, rejoin_timeout_s=rejoin_timeout_s, **options)

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        self._await_any()
        copies: list[WeightBucket] = []
        self._kept = None  # memory for one copy, not for two
        super().update_weights(_copied(buckets, copies) if self._keep else buckets, version)
        if self._keep:
            self._kept = version, copies

    def _give(self, engine: RolloutEngine) -> None:
        if self._kept is None:
            raise EngineError("no copy of the current weights is kept")
        version, buckets = self._kept
        engine.update_weights(buckets, version)

    def _await_any(self) -> None:
        deadline = time.monotonic() + self._patience_s
        while all(replica.state == "down" for replica in self._replicas):
            if self._closed.is_set() or time.monotonic() > deadline:
                raise self._none_left()
            time.sleep(_LOOK_S)


def _copied(buckets: Iterable[WeightBucket], copies: list[WeightBucket]) -> Iterator[WeightBucket]:
    for bucket in buckets:
        tensors = ((name, tensor.detach().to("cpu", copy=True)) for name, tensor in bucket.tensors)
        copies.append(WeightBucket(tuple(tensors)))
        yield bucket
