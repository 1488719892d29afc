"""The Ray executor: a driver that asks, and pools of worker processes that hold the engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from warnings import warn

import ray

from rlcore.controller.dispatch import partition, take
from rlcore.controller.executor import Event, name_of
from rlcore.controller.pending import Pending
from rlcore.controller.placement import ResourcePool, replaceable
from rlcore.engines.settings import WeightSyncSettings
from rlcore.engines.weight_sync import sync_weights
from rlcore.errors import RlcoreWarning, WorkerDied, WorkerError
from rlcore.metrics import Metrics
from rlcore_ray import cluster
from rlcore_ray.answers import Asked, Waiter, death, read
from rlcore_ray.calls import Call, Head, unpacked
from rlcore_ray.capacity import check_fits
from rlcore_ray.group import RayGroup
from rlcore_ray.pool import Pool, build, wait_for_room
from rlcore_ray.remote_result import Remote, first_done
from rlcore_ray.weight_sync import WeightLink

T = TypeVar("T")

FAREWELL_S = 3.0
"""For engines to close what they opened, before their processes are killed."""

MAX_REVIVALS = 10
"""Deaths of one process before they are taken for the fault of what it is asked to do."""


class RayExecutor:
    """See `rlcore.controller.LocalExecutor` for what both executors offer.

    Args:
        pools: by name; see `rlcore.controller.placement`.
        placement: the pool of every role.
        address: of the cluster; None starts one on this machine for as long as the executor lives.
        logs: folder for the workers' output; None leaves it with Ray.
        placement_timeout_s: longest wait for the cluster's resources; ``call_timeout_s`` for an answer.

    Raises:
        PlacementError: the pools do not fit into the cluster.
    """

    overlaps = True
    """Calls on different pools run at the same time."""

    def __init__(
        self,
        pools: Mapping[str, ResourcePool],
        placement: Mapping[str, str],
        *,
        address: str | None = None,
        logs: Path | None = None,
        placement_timeout_s: float = 60.0,
        call_timeout_s: float = 3600.0,
    ) -> None:
        self._placement = dict(placement)
        self.waiter = Waiter(call_timeout_s)
        self._labels = threading.local()
        self._counting = threading.Lock()
        self._replacing = threading.RLock()  # held while processes are replaced, and while they are given weights
        self._behind: set[tuple[str, int]] = set()
        self._caught_up = threading.Condition()
        self._load: dict[tuple[str, int], int] = {}
        self._revivals: dict[tuple[str, int], int] = {}
        self._catch_up: Callable[[], None] | None = None
        self._links: dict[tuple[str, str], WeightLink] = {}
        self._leaving: float | None = None
        self._connected = cluster.connect(address, pools)
        self.pools: dict[str, Pool] = {}
        try:
            check_fits(pools)
            for name, settings in pools.items():
                roles = [role for role, pool in placement.items() if pool == name]
                together = not replaceable(roles)
                self.pools[name] = Pool(name, settings, together, logs, call_timeout_s)
            wait_for_room(list(self.pools.values()), placement_timeout_s)
            for pool in self.pools.values():
                pool.start()
            for pool in self.pools.values():
                pool.ready()
        except BaseException:
            self.close()
            raise

    # --- what both executors offer ---------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        return True

    def barrier(self, name: str = "barrier") -> None:
        """Wait for everything that was asked so far."""
        self.waiter.settle()

    def broadcast(self, value: T, name: str = "broadcast") -> T:
        return value

    def all_gather(self, value: T, name: str = "all_gather") -> list[T]:
        return [value]

    def on_main(self, work: Callable[[], T], name: str = "on_main") -> T:
        return work()

    def build(self, role: str, interface: type[T], factory: Callable[[Mapping[str, Any]], Any]) -> T:
        """The worker group of new engines, one in each process of the role's pool; they are built meanwhile."""
        pool = self.pools[self._placement[role]]
        pool.roles.append((role, factory))
        asked = [
            self.ask(pool, rank, "engine", f"{role}.build", partial(build, role, factory)) for rank in range(len(pool))
        ]
        self.waiter.later(asked)
        return cast(T, RayGroup(self, pool, role, interface, asked))

    def apply(self, group: Any, function: Callable[..., T], *args: Any) -> list[T]:
        """``function(engine, *args)`` in every process of ``group``; the results by rank."""
        work = partial(_on_engine, group._role, function)
        name = f"{group._role}: {name_of(function)}"
        asked = [self.ask(group._pool, rank, "engine", name, work, args) for rank in range(len(group._pool))]
        return [unpacked(head.value, call.body) for head, call in zip(self.waiter.wait(asked), asked)]

    def one(self, group: Any, function: Callable[..., T], *args: Any) -> Pending[T]:
        """``function(engine, *args)`` in the process of ``group`` with the least to do; it may be a coroutine function.

        If the process dies, another one does it.
        """
        name = f"{group._role}: {name_of(function)}"
        work = partial(_on_engine, group._role, function)
        return Remote(self, group._pool, name, work, args, weights=group._role == "rollout")

    def wait(self, pending: Sequence[Pending[Any]], timeout_s: float) -> list[Pending[Any]]:
        """Those of ``pending`` that are done, as soon as one is, or nothing after ``timeout_s`` seconds."""
        return first_done(pending, timeout_s)

    def stream(
        self, group: Any, function: Callable[..., Iterator[tuple[list[int], T]]], items: Sequence[Any], *args: Any
    ) -> Iterator[tuple[list[int], T]]:
        """``function(engine, items, *args)`` over the group's processes, each with its part of ``items``.

        The function yields results with the places of the items that they answer; they arrive as they are made. If a
        process dies, its unanswered items are asked for again.
        """
        group.wait_built()
        pool, work = group._pool, partial(_on_engine, group._role, function)
        name = f"{group._role}: {name_of(function)}"
        open_ = {}

        def ask(rank: int, places: list[int]) -> None:
            worker, given = pool.workers[rank], (take(items, places), *args)
            call = Call(name, work, given, {}, self.label, self.waiter.timeout_s)
            open_[worker.stream.remote(call)] = _Open(rank, worker, places, set(places))

        ranks = self._up_to_date(group)
        for rank, places in zip(ranks, partition(items, len(ranks))):
            if places:
                ask(rank, places)
        while open_:
            ready, _ = ray.wait(list(open_), timeout=self.waiter.timeout_s, fetch_local=False)
            if not ready:
                late = [(f"{name} on {pool.title(part.rank)}", part.worker) for part in open_.values()]
                raise WorkerError(self.waiter.late(late))
            for generator in ready:
                part = open_[generator]
                title = f"{name} on {pool.title(part.rank)}"
                answer = _next(generator)
                if answer is None or isinstance(answer, Exception):
                    del open_[generator]
                    if isinstance(answer, Exception):
                        self.replace(pool, part.rank, part.worker, title, answer)
                        if part.missing:
                            able = self._up_to_date(group)
                            ask(part.rank if part.rank in able else able[0], sorted(part.missing))
                    elif part.missing:
                        raise WorkerError(f"{title}: it ended with {len(part.missing)} items unanswered")
                    continue
                body, head = answer
                if head.failure is not None:
                    self.waiter.fail(title, head.failure)
                answered, result = unpacked(head.value, body)
                places = [part.places[place] for place in answered]
                part.missing.difference_update(places)
                if not part.missing:
                    self.waiter.events.append(head.event)
                yield places, result

    def compute(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` in a worker, where batches among ``args`` are read; batches in the result stay there."""
        pool = self.pools[self._placement["compute"]]
        return Remote(self, pool, name_of(function), partial(_without_engines, function), args).result()

    # --- asking ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        pool: Pool,
        rank: int,
        lane: str,
        name: str,
        work: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Asked:
        """Give one process something to do; returns at once."""
        worker = pool.workers[rank]
        call = Call(name, work, args, dict(kwargs or {}), self.label, self.waiter.timeout_s)
        head, body = getattr(worker, lane).remote(call)
        return Asked(name, pool, rank, worker, head, body)

    def sync_weights(self, trainer: Any, rollout: Any, version: int, settings: WeightSyncSettings) -> Metrics:
        """Make ``rollout`` generate with the weights of ``trainer`` and call them ``version``."""
        pool, key = trainer._pool, (trainer._role, rollout._role)
        if rollout._pool is pool:
            work = partial(_sync_in_process, *key)
            args = (version, settings.bucket_mb << 20)
            self.waiter.wait([self.ask(pool, rank, "engine", "sync_weights", work, args) for rank in range(len(pool))])
            return Metrics()
        with self._replacing:
            if key not in self._links:
                self._links[key] = WeightLink(self, trainer, rollout, settings)
            stats = self._links[key].sync(version)
            with self._caught_up:
                self._behind -= {(rollout._pool.name, rank) for rank in range(len(rollout._pool))}
                self._caught_up.notify_all()
        return stats.metrics()

    @property
    def label(self) -> str:
        """The part of the step that calls of this thread belong to."""
        return getattr(self._labels, "current", "")

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Calls that this thread makes inside belong to the part ``label`` of the step."""
        before, self._labels.current = self.label, label
        try:
            yield
        finally:
            self._labels.current = before

    def timeline(self) -> list[Event]:
        """What workers did since the last call. Work that is not done yet is told of later."""
        self.waiter.check()
        taken, self.waiter.events = self.waiter.events, []
        return taken

    # --- workers that die ------------------------------------------------------------------------------------------

    def on_replaced(self, catch_up: Callable[[], None] | None) -> None:
        """Have ``catch_up`` called, by whoever notices, when a rollout process was put in the place of a dead one.

        Such a process has the weights that it was built with. It is asked for nothing until `sync_weights` has given it
        those of the others, be it in ``catch_up`` or later. None: it is as good as the others.
        """
        self._catch_up = catch_up

    def behind(self, group: Any) -> bool:
        """Whether a process of ``group`` waits for `sync_weights` because it was replaced."""
        return any(pool == group._pool.name for pool, _ in list(self._behind))

    def wait_caught_up(self, timeout_s: float) -> None:
        """Wait until weights were given to all rollout processes; at most ``timeout_s``."""
        with self._caught_up:
            self._caught_up.wait_for(lambda: not self._behind, timeout_s)

    def replace(self, pool: Pool, rank: int, worker: Any, title: str, error: Exception, catch_up: bool = True) -> None:
        """Put a new process in the place of ``worker``, which died of ``error``, unless somebody did already.

        Raises:
            WorkerDied: the pool's processes live and die together, or this one died too often.
        """
        with self._replacing:
            if pool.workers[rank] is not worker:
                return
            lacks_weights = self._catch_up is not None and any(role == "rollout" for role, _ in pool.roles)
            while pool.workers[rank] is worker:
                count = self._revivals[pool.name, rank] = self._revivals.get((pool.name, rank), 0) + 1
                if pool.together or count > MAX_REVIVALS:
                    raise WorkerDied(f"{title} is gone: {death(error)}") from error
                warn(f"{title} is gone ({death(error)}); it is replaced", RlcoreWarning, stacklevel=2)
                if lacks_weights:
                    self._behind.add((pool.name, rank))  # before anybody can ask the new process for anything
                try:
                    pool.revive(rank)
                except WorkerDied as again:
                    title, error = f"a new {pool.name}[{rank}]", again
            if lacks_weights and catch_up and self._catch_up is not None:
                self._catch_up()

    def least_loaded(self, pool: Pool, weights: bool) -> int | None:
        """The process with the least to do, if wanted of those with the current weights; None if there is none."""
        with self._counting:
            ranks = [rank for rank in range(len(pool)) if not (weights and (pool.name, rank) in self._behind)]
            return min(ranks, key=lambda rank: self._load.get((pool.name, rank), 0), default=None)

    def _up_to_date(self, group: Any) -> list[int]:
        """The processes of ``group`` that can be asked; if there are none they are given the weights."""
        pool = group._pool
        behind = self._behind if group._role == "rollout" else set()
        if self._catch_up is not None and all((pool.name, rank) in behind for rank in range(len(pool))):
            self._catch_up()
        able = [rank for rank in range(len(pool)) if (pool.name, rank) not in behind]
        if not able:
            raise WorkerError(f"all processes of {pool.name} were replaced and have not been given the weights yet")
        return able

    def count(self, pool: Pool, rank: int, change: int) -> None:
        with self._counting:
            self._load[pool.name, rank] = self._load.get((pool.name, rank), 0) + change

    def farewell_s(self) -> float:
        """How long an engine that is closed may still be waited for: all of them together have `FAREWELL_S`."""
        if self._leaving is None:
            self._leaving = time.monotonic()
        return max(self._leaving + FAREWELL_S - time.monotonic(), 0)

    def close(self) -> None:
        """End all workers, and the cluster if it is our own."""
        if ray.is_initialized():
            for pool in getattr(self, "pools", {}).values():
                pool.stop()
            if self._connected:
                cluster.disconnect()


@dataclass
class _Open:
    """A stream of answers: who gives them, to which items, and which are missing yet."""

    rank: int
    worker: Any
    places: list[int]
    missing: set[int]


def _next(generator: Any) -> tuple[ray.ObjectRef[Any], Head] | Exception | None:
    """The next answer of a stream; None at its end, an exception if its worker is gone."""
    body = next(generator, None)
    if body is None:
        return None
    try:
        head = read(next(generator))
    except StopIteration:  # what came is no body, but the news of the worker's death
        gone = read(body)
        return gone if isinstance(gone, Exception) else None
    return head if isinstance(head, Exception) else (body, head)


def _sync_in_process(trainer: str, rollout: str, engines: Mapping[str, Any], version: int, bucket_bytes: int) -> None:
    sync_weights(engines[trainer], engines[rollout], version, bucket_bytes)


def _on_engine(role: str, function: Callable[..., Any], engines: Mapping[str, Any], *args: Any) -> Any:
    return function(engines[role], *args)


def _without_engines(function: Callable[..., Any], engines: Mapping[str, Any], *args: Any) -> Any:
    return function(*args)
