"""`Pool`: the worker processes of one resource pool."""

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
from rlcore_ray.calls import Call, Engines, cause_of_death
from rlcore_ray.capacity import group_name, holders, requested, unplaceable
from rlcore_ray.worker import RemoteWorker, WorkerLocation

SILENT_WAIT_S = 3.0
"""Seconds to wait for free resources before telling the user."""
START_S = 300.0
"""Timeout for a process to start and to join the others; it takes seconds, or a minute on a busy machine."""

NOTHING = {"memory": 1}
"""Reserved by a process that needs no resources: Ray has no empty bundles, and a share of a core may not be free."""


@dataclass
class Pool:
    """Processes that are started together.

    Attributes:
        name: as configured.
        one_world: the processes form one world of ``torch.distributed``, and if one dies all are lost; otherwise each
            is an independent replica, and is replaced when it dies (`replace`).
        timeout_s: timeout of calls, and of the process group's collectives.
        placement_group: the resources that Ray reserves; None before `reserve` and after `stop`.
        roles: what was built, in order: ``(role, factory)``.
        workers: actor handles by rank; ``locations`` says where they run.
    """

    name: str
    settings: ResourcePool
    one_world: bool
    logs: Path | None
    timeout_s: float
    placement_group: PlacementGroup | None = None
    workers: list[Any] = field(default_factory=list)
    locations: list[WorkerLocation] = field(default_factory=list)
    roles: list[tuple[str, Callable[..., Any]]] = field(default_factory=list)
    _started: list[ray.ObjectRef[Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.settings.processes

    def reserve(self) -> PlacementGroup:
        """Ask Ray for the pool's resources, which are granted later."""
        self.placement_group = placement_group(
            [requested(self.settings) or NOTHING for _ in range(len(self))],
            strategy=self.settings.strategy.upper(),
            name=group_name(self.name),
        )
        return self.placement_group

    def start(self) -> None:
        """Start the processes; `ready` waits for them."""
        self.workers = [self._spawn(rank) for rank in range(len(self))]
        self._started = [worker.location.remote() for worker in self.workers]

    def ready(self) -> None:
        """Wait until all processes have started and, in a pool of one world, joined the process group.

        Raises:
            WorkerDied: a process ended while it started.
            WorkerError: a process did not start in time, or cannot start.
        """
        self.locations = self._wait_for(dict(enumerate(self._started)), START_S)
        if not self.one_world:
            return
        host = self.locations[0].host
        (port,) = self._wait_for({0: self.workers[0].listen.remote(host)}, START_S)
        joins = {
            rank: worker.join.remote(rank, len(self), host, port, self.timeout_s)
            for rank, worker in enumerate(self.workers)
        }
        self._wait_for(joins, START_S)

    def replace(self, rank: int) -> None:
        """Replace a process that died, and build its engines in the new one. Their state since then is lost.

        Raises:
            WorkerDied: the new process died as well.
            WorkerError: an engine cannot be built in the new process.
        """
        ray.kill(self.workers[rank], no_restart=True)
        worker = self._spawn(rank)
        try:
            (location,) = self._wait_for({rank: worker.location.remote()}, START_S)
            for role, factory in self.roles:
                response, _ = worker.engine.remote(Call(f"{role}: build", partial(build, role, factory)))
                failure = self._wait_for({rank: response}, self.timeout_s)[0].failure
                if failure is not None:
                    raise WorkerError(f"{self.title(rank)} cannot be replaced: {failure.error}\n\n{failure.trace}")
        except BaseException:
            ray.kill(worker, no_restart=True)
            raise
        # last: other threads call the process that stands here, which must have its engines by then
        self.workers[rank], self.locations[rank] = worker, location

    def stop(self) -> None:
        """End all processes and release the resources."""
        for worker in self.workers:
            ray.kill(worker, no_restart=True)
        if self.placement_group is not None:
            remove_placement_group(self.placement_group)
        self.workers, self.placement_group = [], None

    def title(self, rank: int) -> str:
        """Return how messages name a process, with its process id, host and log."""
        title = f"{self.name}[{rank}]"
        known = [f"process {location.pid} on {location.host}" for location in self.locations[rank : rank + 1]]
        known += [] if self.logs is None else [f"log {self._log(rank)}"]
        return f"{title} ({', '.join(known)})" if known else title

    def _spawn(self, rank: int) -> Any:
        assert self.placement_group is not None
        strategy = PlacementGroupSchedulingStrategy(self.placement_group, placement_group_bundle_index=rank)
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
        """Return the values behind ``refs`` (by rank). A failure raises immediately: others may wait for it."""
        ranks = {ref: rank for rank, ref in refs.items()}
        values: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(values) < len(refs):
            missing = [ref for ref, rank in ranks.items() if rank not in values]
            ready, _ = ray.wait(missing, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                late = ", ".join(self.title(ranks[ref]) for ref in missing)
                raise WorkerError(f"{late} did not start within {timeout_s:g} s")
            for ref in ready:
                try:
                    values[ranks[ref]] = ray.get(ref, timeout=START_S)
                except ray.exceptions.RayTaskError as error:
                    raise WorkerError(f"{self.title(ranks[ref])} cannot start: {error.cause or error}") from error
                except ray.exceptions.RayError as error:
                    raise WorkerDied(
                        f"{self.title(ranks[ref])} ended while it started: {cause_of_death(error)}"
                    ) from error
        return [values[rank] for rank in refs]


def build(role: str, factory: Callable[..., Any], engines: Engines) -> tuple[int, int]:
    """Build the engine of ``role`` in a worker and return its data-parallel rank and size."""
    engines[role] = factory(dict(engines))
    return getattr(engines[role], "dp_rank", 0), getattr(engines[role], "dp_size", 1)


def _granted(group: PlacementGroup, deadline: float) -> bool:
    """Wait in short intervals: while Ray (2.60) waits for a placement group, Ctrl-C has no effect."""
    while not group.wait(1):
        if time.monotonic() > deadline:
            return False
    return True


def wait_for_resources(pools: Sequence[Pool], timeout_s: float) -> None:
    """Wait until the resources of all pools are granted; warn after `SILENT_WAIT_S`.

    Raises:
        PlacementError: they are not granted within ``timeout_s``; nothing stays reserved.
    """
    reserved = {pool.name: pool.reserve() for pool in pools}
    start = time.monotonic()
    silent_s = min(timeout_s, SILENT_WAIT_S)
    waiting = [name for name, group in reserved.items() if not _granted(group, start + silent_s)]
    if waiting and timeout_s > silent_s:
        held = "; ".join(holders(own={group_name(name) for name in reserved})) or "nothing"
        message = f"waiting up to {timeout_s:g} s for resources for {', '.join(waiting)}; used by other jobs: {held}"
        warn(message, RlcoreWarning, stacklevel=2)
        waiting = [name for name in waiting if not _granted(reserved[name], start + timeout_s)]
    if waiting:
        settings = {pool.name: pool.settings for pool in pools}
        message = unplaceable(settings, f"no free resources for {', '.join(waiting)} within {timeout_s:g} s")
        for pool in pools:
            pool.stop()
        raise PlacementError(message)
