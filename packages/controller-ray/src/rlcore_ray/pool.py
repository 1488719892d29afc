"""The worker processes of one resource pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from warnings import warn

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlcore.controller.placement import ResourcePool
from rlcore.errors import PlacementError, RlcoreWarning, WorkerDied, WorkerError
from rlcore_ray.answers import death
from rlcore_ray.calls import Call
from rlcore_ray.capacity import group_name, holders, requested, unplaceable
from rlcore_ray.worker import Place, RemoteWorker

PATIENCE_S = 3.0
"""Wait for room of which nothing is said."""
START_S = 300.0
"""Longest wait for a process to start and to meet the others: seconds, or a minute on a machine that is busy."""

NOTHING = {"memory": 1}
"""What a process reserves that asked for nothing: Ray knows no empty bundles. A share of a core might not be free."""


@dataclass
class Pool:
    """Processes that are started together.

    Attributes:
        name: as configured.
        together: the processes form one world of ``torch.distributed`` and live and die together; otherwise each is a
            replica of its own, and is replaced when it dies (`revive`).
        roles: what was built, in order: ``(role, factory)``.
        workers: actor handles by rank; ``places`` where they run.
    """

    name: str
    settings: ResourcePool
    together: bool
    logs: Path | None
    timeout_s: float
    group: PlacementGroup | None = None
    workers: list[Any] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    roles: list[tuple[str, Callable[..., Any]]] = field(default_factory=list)
    _started: list[ray.ObjectRef[Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.settings.processes

    def reserve(self) -> PlacementGroup:
        """Ask for the pool's resources; they are granted later."""
        self.group = placement_group(
            [requested(self.settings) or NOTHING for _ in range(len(self))],
            strategy=self.settings.strategy.upper(),
            name=group_name(self.name),
        )
        return self.group

    def start(self) -> None:
        """Start the processes; `ready` waits for them."""
        self.workers = [self._spawn(rank) for rank in range(len(self))]
        self._started = [worker.place.remote() for worker in self.workers]

    def ready(self) -> None:
        """Wait until all processes are up and know each other.

        Raises:
            WorkerDied: one ended at its start.
            WorkerError: one is not up in time, or cannot be.
        """
        self.places = self._wait_for(dict(enumerate(self._started)), START_S)
        if not self.together:
            return
        host = self.places[0].host
        (port,) = self._wait_for({0: self.workers[0].listen.remote(host)}, START_S)
        joins = {
            rank: worker.join.remote(rank, len(self), host, port, self.timeout_s)
            for rank, worker in enumerate(self.workers)
        }
        self._wait_for(joins, START_S)

    def revive(self, rank: int) -> None:
        """Replace a process that died, with all of its engines. What they knew beyond their construction is gone.

        Raises:
            WorkerDied: the new one is gone as well.
            WorkerError: an engine cannot be built in it.
        """
        ray.kill(self.workers[rank], no_restart=True)
        worker = self._spawn(rank)
        try:
            (place,) = self._wait_for({rank: worker.place.remote()}, START_S)
            for role, factory in self.roles:
                head, _ = worker.engine.remote(Call(f"{role}: build", partial(build, role, factory)))
                failure = self._wait_for({rank: head}, self.timeout_s)[0].failure
                if failure is not None:
                    raise WorkerError(f"{self.title(rank)} cannot be replaced: {failure.error}\n\n{failure.trace}")
        except BaseException:
            ray.kill(worker, no_restart=True)
            raise
        # last: other threads ask whoever stands here, and it must have its engines by then
        self.workers[rank], self.places[rank] = worker, place

    def stop(self) -> None:
        """End all processes and give the resources back."""
        for worker in self.workers:
            ray.kill(worker, no_restart=True)
        if self.group is not None:
            remove_placement_group(self.group)
        self.workers, self.group = [], None

    def title(self, rank: int) -> str:
        """How messages call a process."""
        title = f"{self.name}[{rank}]"
        known = [f"process {place.pid} on {place.host}" for place in self.places[rank : rank + 1]]
        known += [] if self.logs is None else [f"log {self._log(rank)}"]
        return f"{title} ({', '.join(known)})" if known else title

    def _spawn(self, rank: int) -> Any:
        assert self.group is not None
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
        log = None if self.logs is None else str(self._log(rank))
        return RemoteWorker.options(
            num_cpus=self.settings.cpus_per_process or 0,
            num_gpus=self.settings.gpus_per_process,
            scheduling_strategy=strategy,
        ).remote(f"{self.name}[{rank}]", log)

    def _log(self, rank: int) -> Path:
        assert self.logs is not None
        return self.logs / f"{self.name}-{rank}.log"

    def _wait_for(self, refs: Mapping[int, ray.ObjectRef[Any]], timeout_s: float) -> list[Any]:
        """The values behind ``refs`` (by rank). One that fails is heard of at once: the others may wait for it."""
        ranks = {ref: rank for rank, ref in refs.items()}
        values: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(values) < len(refs):
            missing = [ref for ref, rank in ranks.items() if rank not in values]
            ready, _ = ray.wait(missing, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                late = ", ".join(self.title(ranks[ref]) for ref in missing)
                raise WorkerError(f"not started within {timeout_s:g} s: {late}")
            for ref in ready:
                try:
                    values[ranks[ref]] = ray.get(ref, timeout=START_S)
                except ray.exceptions.RayTaskError as error:
                    raise WorkerError(f"{self.title(ranks[ref])} cannot start: {error.cause or error}") from error
                except ray.exceptions.RayError as error:
                    raise WorkerDied(f"{self.title(ranks[ref])} ended while it started: {death(error)}") from error
        return [values[rank] for rank in refs]


def build(role: str, factory: Callable[..., Any], engines: dict[str, Any]) -> tuple[int, int]:
    """In a worker: build the engine of ``role``; its data-parallel rank and size."""
    engines[role] = factory(dict(engines))
    return getattr(engines[role], "dp_rank", 0), getattr(engines[role], "dp_size", 1)


def _granted(group: PlacementGroup, deadline: float) -> bool:
    """Wait in small pieces: inside of Ray's (2.60) waiting for a placement group Ctrl-C is not heard."""
    while not group.wait(1):
        if time.monotonic() > deadline:
            return False
    return True


def wait_for_room(pools: Sequence[Pool], timeout_s: float) -> None:
    """Wait until the resources of all pools are granted; after a moment, say what is waited for.

    Raises:
        PlacementError: they are not within ``timeout_s``; nothing stays reserved.
    """
    groups = {pool.name: pool.reserve() for pool in pools}
    start = time.monotonic()
    patience = min(timeout_s, PATIENCE_S)
    waiting = [name for name, group in groups.items() if not _granted(group, start + patience)]
    if waiting and timeout_s > patience:
        held = "; ".join(holders(own={group_name(name) for name in groups})) or "nobody else"
        message = f"waiting up to {timeout_s:g} s for room for {', '.join(waiting)}; held by others: {held}"
        warn(message, RlcoreWarning, stacklevel=2)
        waiting = [name for name in waiting if not _granted(groups[name], start + timeout_s)]
    if waiting:
        settings = {pool.name: pool.settings for pool in pools}
        message = unplaceable(settings, f"no room for {', '.join(waiting)} after {timeout_s:g} s")
        for pool in pools:
            pool.stop()
        raise PlacementError(message)
