"""The local executor: engines in this process.

Alone, a group is its engine. Under ``torchrun`` every process runs the same controller program on the same batch, so
that the program stays in step without a driver process:

- SHARD works on this rank's part and gathers all parts on every rank;
- BROADCAST runs on every rank and returns rank 0's answer on all; RANK_ZERO runs on rank 0 only;
- STREAM, plain attributes and ``async`` methods are this rank's own.

Every call but the last kind is a meeting of all ranks: what fails on one raises on all (`rlcore.controller.spmd`).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from rlcore.controller.dispatch import (
    Dispatch,
    dispatch_of,
    first_argument,
    gather,
    partition,
    partition_of_call,
    take,
)
from rlcore.controller.executor import Event, Factory, name_of
from rlcore.controller.pending import Done, Pending
from rlcore.metrics import Metrics

if TYPE_CHECKING:
    from rlcore.controller.spmd import Ranks
    from rlcore.engines.settings import WeightSyncSettings

T = TypeVar("T")


class LocalExecutor:
    """Makes worker groups of in-process engines, and keeps the processes of one program in step.

    With one process everything below is a plain call.

    Args:
        timeout_s: longest wait for another rank; the error names the rank and the call.
        grace_s: how long a rank that failed waits for the others to hear of it.
    """

    overlaps = False

    def __init__(self, timeout_s: float = 3600.0, grace_s: float = 30.0) -> None:
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._met: tuple[Any, Ranks] | None = None
        self._engines: dict[str, Any] = {}

    def build(self, role: str, interface: type[T], factory: Factory) -> T:
        """The worker group of a new engine; ``factory`` is given the engines built before, by role."""
        engine = factory(dict(self._engines))
        self._engines[role] = engine
        return cast(T, self.group(interface, engine, role))

    def group(self, interface: type[T], engine: T, role: str = "") -> T:
        """``engine`` behind the dispatch of ``interface``, typed as the interface; ``role`` names it in errors."""
        return cast(T, _LocalGroup(self, interface, engine, role or interface.__name__))

    @property
    def is_main(self) -> bool:
        """True on the rank that talks to the outside world: tracks, prints, writes single files."""
        distributed = torch.distributed
        return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0

    def barrier(self, name: str = "barrier") -> None:
        """Wait for all ranks."""
        self.on_main(lambda: None, name)

    def broadcast(self, value: T, name: str = "broadcast") -> T:
        """Rank 0's ``value`` on every rank."""
        return self.on_main(lambda: value, name)

    def all_gather(self, value: T, name: str = "all_gather") -> list[T]:
        """Every rank's ``value``, by rank."""
        ranks = self._ranks()
        return [value] if ranks is None else cast("list[T]", ranks.every(name, lambda: value))

    def on_main(self, work: Callable[[], T], name: str = "on_main") -> T:
        """Do ``work`` on rank 0 only; every rank gets its result, or its error."""
        ranks = self._ranks()
        return work() if ranks is None else cast(T, ranks.first(name, work, everywhere=False))

    def apply(self, group: Any, function: Callable[..., T], *args: Any) -> list[T]:
        """``function(engine, *args)`` in every process of ``group``; the results by rank."""
        ranks, engine = self._ranks(), group._engine
        if ranks is None:
            return [function(engine, *args)]
        return ranks.every(f"{group._role}: {name_of(function)}", lambda: function(engine, *args))

    def one(self, group: Any, function: Callable[..., T], *args: Any) -> Done[T]:
        """``function(engine, *args)`` in the main process of ``group``; it may be a coroutine function."""

        def work() -> Any:
            result = function(group._engine, *args)
            return asyncio.run(result) if inspect.iscoroutine(result) else result

        return Done(self.on_main(work, f"{group._role}: {name_of(function)}"))

    def wait(self, pending: Sequence[Pending[Any]], timeout_s: float) -> list[Pending[Any]]:
        """All of ``pending``: here everything is done at once."""
        return list(pending)

    def stream(
        self, group: Any, function: Callable[..., Iterator[tuple[list[int], T]]], items: Sequence[Any], *args: Any
    ) -> Iterator[tuple[list[int], T]]:
        """``function(engine, items, *args)`` over the group's processes, each with its part of ``items``.

        The function yields results with the places of the items that they answer. Under ``torchrun`` all results are
        exchanged before the first is yielded.
        """
        ranks, engine = self._ranks(), group._engine
        if ranks is None or engine.dp_size == 1:
            yield from function(engine, items, *args)
            return
        parts = partition(items, engine.dp_size)
        own = parts[engine.dp_rank]
        answers = ranks.every(
            f"{group._role}: {name_of(function)}",
            lambda: (engine.dp_rank, list(function(engine, take(items, own), *args))),
        )
        for dp_rank, results in sorted(dict(reversed(answers)).items()):
            for places, result in results:
                yield [parts[dp_rank][place] for place in places], result

    def compute(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` where the data is: here, on every rank."""
        return function(*args)

    def sync_weights(self, trainer: Any, rollout: Any, version: int, settings: WeightSyncSettings) -> Metrics:
        """Make ``rollout`` generate with the weights of ``trainer`` (`rlcore.engines.sync_weights`)."""
        from rlcore.engines.weight_sync import sync_weights

        sync_weights(trainer, rollout, version, settings.bucket_mb << 20)
        return Metrics()

    def on_replaced(self, catch_up: Callable[[], None] | None) -> None:
        """No process of this executor is ever replaced."""
        return

    def behind(self, group: Any) -> bool:
        return False

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Nothing is labelled: the caller sees how long its calls take."""
        yield

    def timeline(self) -> list[Event]:
        return []

    def close(self) -> None:
        """End the threads that talk to the other ranks; engines are closed by whoever built them.

        A rank that exits while such a thread still holds tensors of its last call dies of SIGABRT (torch 2.13).
        """
        met, self._met = self._met, None
        if met is not None and torch.distributed.is_initialized() and met[0] is torch.distributed.group.WORLD:
            met[1].close()

    def _ranks(self) -> Ranks | None:
        """The ranks of the present default process group; None without one, or alone in it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        world = torch.distributed.group.WORLD
        if torch.distributed.get_world_size() == 1:
            return None
        if self._met is None or self._met[0] is not world:
            from rlcore.controller.spmd import Ranks

            self._met = (world, Ranks(self._timeout_s, self._grace_s))
        return self._met[1]


class _LocalGroup:
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
        if how is not Dispatch.SHARD or engine.dp_size == 1:
            return ranks.first(call, lambda: method(*args, **kwargs), everywhere=how is not Dispatch.RANK_ZERO)
        argument, call_part = first_argument(method, args, kwargs)
        parts = divide(args, kwargs, argument, engine.dp_size)
        answers = ranks.every(
            f"{call} with {len(argument)} samples",
            lambda: (engine.dp_rank, call_part(take(argument, parts[engine.dp_rank]))),
        )
        results = dict(reversed(answers))  # ranks that share a part: the lowest answers
        return gather([results[dp_rank] for dp_rank in range(engine.dp_size)], parts)

    return spread
