"""The local executor: engines in this process.

Alone, a group is its engine. Under ``torchrun`` every process runs the same controller program on the same batch: a
SHARD call works on this rank's part and gathers all parts on every rank, so that the program stays in step without a
driver process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from rlcore.controller.dispatch import Dispatch, dispatch_of, gather, partition, take

T = TypeVar("T")


class _LocalGroup:
    """Forwards calls to ``engine`` with the dispatch declared on ``interface``."""

    def __init__(self, interface: type, engine: Any) -> None:
        self._interface = interface
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._engine, name)
        if dispatch_of(self._interface, name) is Dispatch.SHARD and self._engine.dp_size > 1:
            return _sharded(attribute, self._engine.dp_rank, self._engine.dp_size)
        return attribute


def _sharded(method: Callable[..., Any], rank: int, size: int) -> Callable[..., Any]:
    @wraps(method)
    def call(argument: Any, *args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist

        parts = partition(argument, size)
        mine = method(take(argument, parts[rank]), *args, **kwargs)
        results: list[tuple[int, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(results, (rank, mine))
        by_rank = dict(result for result in results if result is not None)
        return gather([by_rank[index] for index in range(size)], parts)

    return call


class LocalExecutor:
    """Makes worker groups of in-process engines."""

    def group(self, interface: type[T], engine: T) -> T:
        """``engine`` behind the dispatch of ``interface``, typed as the interface."""
        return cast(T, _LocalGroup(interface, engine))
