"""The Ray executor: a driver that calls, and pools of worker processes that hold the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import ray

from rlcore.controller.executor import Event, Executor, Factory, name_of
from rlcore.controller.pending import Pending
from rlcore.controller.placement import ResourcePool, replaceable
from rlcore.engines.settings import WeightSyncSettings
from rlcore.engines.weight_sync import sync_weights
from rlcore.metrics import Metrics
from rlcore_ray import cluster, streams
from rlcore_ray.calls import Engines, unpacked
from rlcore_ray.capacity import check_fits
from rlcore_ray.pool import Pool, build, wait_for_resources
from rlcore_ray.remote_result import RemoteResult, first_done
from rlcore_ray.role_workers import Role, RoleWorkers, role_of
from rlcore_ray.weight_sync import WeightLink
from rlcore_ray.workers import Workers

T = TypeVar("T")


class RayExecutor(Executor):
    """An `Executor` whose engines are in the processes of Ray actors.

    Args:
        pools: by name; see `rlcore.controller.placement`.
        placement: the pool of every role.
        address: of the cluster; None starts one on this machine for as long as the executor lives.
        logs: folder for the workers' output; None leaves it with Ray.
        placement_timeout_s: timeout for the cluster to grant the pools' resources.
        call_timeout_s: timeout of one call in a worker.

    Raises:
        ConfigError: there is no cluster at ``address``.
        PlacementError: the pools do not fit into the cluster.
    """

    overlaps = True

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
        self._workers = Workers(call_timeout_s)
        self._links: dict[tuple[str, str], WeightLink] = {}
        self._connected = cluster.connect(address, pools)
        self.pools: dict[str, Pool] = {}
        try:
            check_fits(pools)
            for name, settings in pools.items():
                roles = [role for role, pool in placement.items() if pool == name]
                self.pools[name] = Pool(name, settings, not replaceable(roles), logs, call_timeout_s)
            wait_for_resources(list(self.pools.values()), placement_timeout_s)
            for pool in self.pools.values():
                pool.start()
            for pool in self.pools.values():
                pool.ready()
        except BaseException:
            self.close()
            raise

    def build(self, role: str, interface: type[T], factory: Factory) -> T:
        pool = self.pools[self._placement[role]]
        pool.roles.append((role, factory))
        work = partial(build, role, factory)
        calls = [self._workers.call(pool, rank, "engine", f"{role}.build", work) for rank in range(len(pool))]
        self._workers.waiter.defer(calls)
        return cast(T, RoleWorkers(self._workers, Role(pool, role), interface, calls))

    def apply(self, workers: Any, function: Callable[..., T], *args: Any) -> list[T]:
        role = role_of(workers)
        work, name = partial(_on_engine, role.name, function), f"{role.name}: {name_of(function)}"
        calls = [self._workers.call(role.pool, rank, "engine", name, work, args) for rank in range(len(role.pool))]
        return [unpacked(response.value, call.body) for response, call in zip(self._workers.waiter.wait(calls), calls)]

    def submit(self, workers: Any, function: Callable[..., T], *args: Any) -> Pending[T]:
        workers.wait_built()  # replicas take requests while their engine is being built
        role = role_of(workers)
        work, name = partial(_on_engine, role.name, function), f"{role.name}: {name_of(function)}"
        return RemoteResult(self._workers, role.pool, name, work, args, needs_weights=role.name == "rollout")

    def wait_any(self, pending: Sequence[Pending[Any]], timeout_s: float) -> list[Pending[Any]]:
        return first_done(pending, timeout_s)

    def stream(
        self, workers: Any, function: Callable[..., Iterator[tuple[list[int], T]]], items: Sequence[Any], *args: Any
    ) -> Iterator[tuple[list[int], T]]:
        workers.wait_built()
        role = role_of(workers)
        work, name = partial(_on_engine, role.name, function), f"{role.name}: {name_of(function)}"
        yield from streams.stream(self._workers, role, name, work, items, args)

    def compute(self, function: Callable[..., T], *args: Any) -> T:
        pool = self.pools[self._placement["compute"]]
        work = partial(_without_engines, function)
        return RemoteResult[T](self._workers, pool, name_of(function), work, args).result()

    def sync_weights(self, trainer: Any, rollout: Any, version: int, settings: WeightSyncSettings) -> Metrics:
        source, target = role_of(trainer), role_of(rollout)
        if target.pool is source.pool:
            work = partial(_sync_in_process, source.name, target.name)
            args = (version, settings.bucket_mb << 20)
            ranks = range(len(source.pool))
            calls = [self._workers.call(source.pool, rank, "engine", "sync_weights", work, args) for rank in ranks]
            self._workers.waiter.wait(calls)
            return Metrics()
        key = source.name, target.name
        with self._workers.updating_weights(target.pool):
            if key not in self._links:
                self._links[key] = WeightLink(self._workers, source, target, settings)
            return self._links[key].sync(version).metrics()

    def on_worker_replaced(self, catch_up: Callable[[], None] | None) -> None:
        self._workers.catch_up = catch_up

    def has_stale_workers(self, workers: Any) -> bool:
        return self._workers.has_stale(role_of(workers).pool)

    def trace_label(self, label: str) -> AbstractContextManager[None]:
        return self._workers.trace_label(label)

    def timeline(self) -> list[Event]:
        """Return the calls that workers finished since the last call. Unfinished calls are reported by a later call."""
        return self._workers.waiter.take_events()

    def barrier(self, name: str = "barrier") -> None:
        self._workers.waiter.settle()

    def close(self) -> None:
        """End all workers, and the cluster if this executor started it."""
        if ray.is_initialized():
            for pool in self.pools.values():
                pool.stop()
            if self._connected:
                cluster.disconnect()


def _sync_in_process(trainer: str, rollout: str, engines: Engines, version: int, bucket_bytes: int) -> None:
    sync_weights(engines[trainer], engines[rollout], version, bucket_bytes)


def _on_engine(role: str, function: Callable[..., Any], engines: Engines, *args: Any) -> Any:
    return function(engines[role], *args)


def _without_engines(function: Callable[..., Any], engines: Engines, *args: Any) -> Any:
    return function(*args)
