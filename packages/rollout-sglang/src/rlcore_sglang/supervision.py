"""`SupervisedReplicas`: servers that get the current weights when they are restarted, from a copy in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rlcore.engines.rollout import RolloutEngine
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.serving.replicas import Replicas


class SupervisedReplicas(Replicas):
    """`Replicas` over servers that are restarted when they die.

    An update waits for a server if all are being restarted.

    Args:
        factories: start a server, unless it runs already, and build its engine.
        keep_weights: keep a copy of the current weights in host memory, for servers that are restarted.
        options: of `Replicas`.
    """

    def __init__(
        self,
        factories: Sequence[Callable[[], RolloutEngine]],
        *,
        keep_weights: bool,
        rejoin_timeout_s: float,
        **options: Any,
    ) -> None:
        self._kept: tuple[int, list[WeightBucket]] | None = None
        self._keep_weights, self._update_timeout_s = keep_weights, rejoin_timeout_s
        refresh = self._send_kept if keep_weights else None
        super().__init__(factories, refresh=refresh, rejoin_timeout_s=rejoin_timeout_s, **options)

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Give all servers the weights, and keep a copy; see `Replicas.update_weights`."""
        self.wait_until_running(self._update_timeout_s)
        copies: list[WeightBucket] = []
        self._kept = None  # memory for one copy, not for two
        super().update_weights(_copied(buckets, copies) if self._keep_weights else buckets, version)
        if self._keep_weights:
            self._kept = version, copies

    def _send_kept(self, engine: RolloutEngine) -> None:
        if self._kept is None:
            raise EngineError("this process holds no copy of the current weights")
        version, buckets = self._kept
        engine.update_weights(buckets, version)


def _copied(buckets: Iterable[WeightBucket], copies: list[WeightBucket]) -> Iterator[WeightBucket]:
    for bucket in buckets:
        tensors = ((name, tensor.detach().to("cpu", copy=True)) for name, tensor in bucket.tensors)
        copies.append(WeightBucket(tuple(tensors)))
        yield bucket
