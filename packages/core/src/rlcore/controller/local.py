"""The local executor: engines in this process.

With one process, the workers of a role are its engine. Under ``torchrun`` every process runs the same controller
program on the same batch, so that the program stays in step without a driver process:

- SHARD calls the engine with this rank's part and gathers all parts on every rank;
- BROADCAST calls the engine on every rank and returns rank 0's result on all;
- STREAM, plain attributes and ``async`` methods use this rank's engine alone.

All ranks take part in every call but the last kind: what fails on one rank raises on all (`rlcore.controller.spmd`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from rlcore import event_loop
from rlcore.controller.dispatch import (
    Dispatch,
    dispatch_of,
    first_argument,
    gather,
    partition,
    partition_of_call,
    take,
)
from rlcore.controller.executor import Event, Executor, Factory, name_of
from rlcore.controller.pending import Done, Pending
from rlcore.metrics import Metrics

if TYPE_CHECKING:
    from rlcore.controller.spmd import Ranks
    from rlcore.engines.settings import WeightSyncSettings

T = TypeVar("T")


class LocalExecutor(Executor):
    """An `Executor` of engines in this process, which keeps the processes of one program in step.

    With one process every method is a plain call.

    Args:
        timeout_s: timeout of waiting for another rank; the error names the rank and the call.
        grace_s: how long a rank that failed waits until the other ranks have seen its failure.
    """

    overlaps = False

    def __init__(self, timeout_s: float = 3600.0, grace_s: float = 30.0) -> None:
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._world: tuple[Any, Ranks] | None = None
        self._engines: dict[str, Any] = {}

    def build(self, role: str, interface: type[T], factory: Factory) -> T:
        engine = factory(dict(self._engines))
        self._engines[role] = engine
        return cast(T, self.workers(interface, engine, role))

    def workers(self, interface: type[T], engine: T, role: str = "") -> T:
        """Return ``engine`` behind the dispatch that ``interface`` declares; ``role`` names it in errors."""
        return cast(T, _LocalWorkers(self, interface, engine, role or interface.__name__))

    @property
    def is_main(self) -> bool:
        """True on the rank that writes metrics, messages and single files."""
        distributed = torch.distributed
        return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0

    def barrier(self, name: str = "barrier") -> None:
        self.on_main(lambda: None, name)

    def all_gather(self, value: T, name: str = "all_gather") -> list[T]:
        """Return every rank's ``value``, by rank."""
        ranks = self._ranks()
        return [value] if ranks is None else cast("list[T]", ranks.gather_from_all(name, lambda: value))

    def on_main(self, work: Callable[[], T], name: str = "on_main") -> T:
        """Call ``work`` on rank 0 only and return its result, or raise its error, on every rank."""
        ranks = self._ranks()
        return work() if ranks is None else cast(T, ranks.broadcast_from_rank0(name, work, everywhere=False))

    def apply(self, workers: Any, function: Callable[..., T], *args: Any) -> list[T]:
        ranks, engine = self._ranks(), workers._engine
        if ranks is None:
            return [function(engine, *args)]
        return ranks.gather_from_all(f"{workers._role}: {name_of(function)}", lambda: function(engine, *args))

    def submit(self, workers: Any, function: Callable[..., T], *args: Any) -> Done[T]:
        def work() -> Any:
            result = function(workers._engine, *args)
            return event_loop.run(result) if inspect.iscoroutine(result) else result

        return Done(self.on_main(work, f"{workers._role}: {name_of(function)}"))

    def wait_any(self, pending: Sequence[Pending[Any]], timeout_s: float) -> list[Pending[Any]]:
        return list(pending)

    def stream(
        self, workers: Any, function: Callable[..., Iterator[tuple[list[int], T]]], items: Sequence[Any], *args: Any
    ) -> Iterator[tuple[list[int], T]]:
        # under torchrun all results are exchanged before the first is yielded
        ranks, engine = self._ranks(), workers._engine
        if ranks is None or engine.dp_size == 1:
            yield from function(engine, items, *args)
            return
        parts = partition(items, engine.dp_size)
        own = parts[engine.dp_rank]
        answers = ranks.gather_from_all(
            f"{workers._role}: {name_of(function)}",
            lambda: (engine.dp_rank, list(function(engine, take(items, own), *args))),
        )
        for dp_rank, results in sorted(dict(reversed(answers)).items()):
            for indices, result in results:
                yield [parts[dp_rank][index] for index in indices], result

    def compute(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    def sync_weights(self, trainer: Any, rollout: Any, version: int, settings: WeightSyncSettings) -> Metrics:
        from rlcore.engines.weight_sync import sync_weights

        sync_weights(trainer, rollout, version, settings.bucket_mb << 20)
        return Metrics()

    def on_worker_replaced(self, catch_up: Callable[[], None] | None) -> None:
        return  # no process of this executor is replaced

    def has_stale_workers(self, workers: Any) -> bool:
        return False

    @contextmanager
    def trace_label(self, label: str) -> Iterator[None]:
        yield  # there are no calls in other processes to label

    def timeline(self) -> list[Event]:
        return []

    def close(self) -> None:
        """Forget the engines, which their builder closes; end the threads that communicate with the other ranks.

        A rank that exits while such a thread still holds tensors of its last call dies of SIGABRT (torch 2.13).
        """
        self._engines = {}
        world, self._world = self._world, None
        if world is not None and torch.distributed.is_initialized() and world[0] is torch.distributed.group.WORLD:
            world[1].close()

    def _ranks(self) -> Ranks | None:
        """Return the ranks of the current default process group; None without one, or if it has one process."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        world = torch.distributed.group.WORLD
        if torch.distributed.get_world_size() == 1:
            return None
        if self._world is None or self._world[0] is not world:
            from rlcore.controller.spmd import Ranks

            self._world = (world, Ranks(self._timeout_s, self._grace_s))
        return self._world[1]


@cache
def process_executor() -> LocalExecutor:
    """Return the local executor that all code of this process shares."""
    return LocalExecutor()


class _LocalWorkers:
    """Forwards calls to ``engine`` with the dispatch declared on ``interface``."""

    def __init__(self, executor: LocalExecutor, interface: type, engine: Any, role: str) -> None:
        self._executor = executor
        self._interface = interface
        self._engine = engine
        self._role = role

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._engine, name)
        how = dispatch_of(self._interface, name)
        ranks = self._executor._ranks()
        if ranks is None or how is None or how is Dispatch.STREAM:
            return attribute
        divide = partial(partition_of_call, self._interface, name)
        return _spread(how, ranks, f"{self._role}.{name}", attribute, self._engine, divide)


def _spread(
    how: Dispatch,
    ranks: Ranks,
    call: str,
    method: Callable[..., Any],
    engine: Any,
    divide: Callable[..., list[list[int]]],
) -> Callable[..., Any]:
    @wraps(method)
    def spread(*args: Any, **kwargs: Any) -> Any:
        if how is Dispatch.BROADCAST or engine.dp_size == 1:
            return ranks.broadcast_from_rank0(call, lambda: method(*args, **kwargs))
        argument, call_part = first_argument(method, args, kwargs)
        parts = divide(args, kwargs, argument, engine.dp_size)
        answers = ranks.gather_from_all(
            f"{call} with {len(argument)} samples",
            lambda: (engine.dp_rank, call_part(take(argument, parts[engine.dp_rank]))),
        )
        results = dict(reversed(answers))  # of ranks that share a part, the lowest answers
        return gather([results[dp_rank] for dp_rank in range(engine.dp_size)], parts)

    return spread
