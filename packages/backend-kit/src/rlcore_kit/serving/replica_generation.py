"""Generation over replicas: choose one for every request, watch it, and retry elsewhere if it fails."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.replica_state import Replica, ReplicaPool, UnfinishedRequest

_SEED_BITS = 63  # the range of every backend's generators
_LATE_RESULT_S = 0.1  # grace period for a result that is already in flight from a drained replica
_CANCEL_TIMEOUT_S = 5.0  # for an engine to forget a cancelled request
_POLL_S = 0.2  # between two looks for a replica while there is none


class RequestRouter:
    """Routes requests to the replicas of ``pool``; see `Replicas` for the arguments.

    Args:
        drain: called with a replica, the generation of the engine that failed, and the reason.
    """

    def __init__(
        self,
        pool: ReplicaPool,
        drain: Callable[[Replica, int, str], None],
        *,
        seed: int,
        attempts: int,
        stall_timeout_s: float | None,
        rejoin_timeout_s: float,
    ) -> None:
        self._pool, self._drain = pool, drain
        self._seeds = random.Random(seed)
        self._attempts = attempts
        self._stall_timeout_s, self._rejoin_timeout_s = stall_timeout_s, rejoin_timeout_s

    async def generate(self, request: GenerationRequest) -> Completion:
        """Generate one completion; see `Replicas.generate`."""
        pool = self._pool
        with pool.lock:
            if request.sampling.seed is None:
                seed = self._seeds.getrandbits(_SEED_BITS)
                request = replace(request, sampling=replace(request.sampling, seed=seed))
            unfinished = UnfinishedRequest(request, asyncio.get_running_loop())
            pool.asleep = False
            pool.unfinished.add(unfinished)
        failures: list[str] = []
        try:
            while True:
                replica = await self._route(unfinished)
                if replica is None:
                    return Completion([], [], "abort", request_id=request.request_id)
                outcome = await self._generate_on(replica, unfinished)
                if isinstance(outcome, Completion):
                    return outcome
                failures.append(f"{replica.name}: {outcome}")
                if len(failures) >= self._attempts:
                    raise EngineError(
                        f"request {request.request_id!r} was given up after {len(failures)} replicas failed at it: "
                        + "; ".join(failures)
                    )
        finally:
            with pool.lock:
                pool.balance.finish(unfinished)
                pool.unfinished.discard(unfinished)

    async def _route(self, unfinished: UnfinishedRequest) -> Replica | None:
        """Return the replica for a request, waiting for one if necessary; None if the request was aborted."""
        pool = self._pool
        deadline = time.monotonic() + self._rejoin_timeout_s
        while True:
            with pool.lock:
                if unfinished.aborted:
                    return None
                index = pool.balance.assign(unfinished, unfinished.cost, unfinished.request.group)
                if index is not None:
                    replica = pool.replicas[index]
                    if pool.balance.load(index) == unfinished.cost:  # the replica was idle
                        replica.progress = time.monotonic()
                    unfinished.lost = unfinished.loop.create_future()
                    return replica
                if not pool.can_recover():
                    raise pool.none_left()
            if time.monotonic() > deadline:
                raise pool.none_left(f" (none came back within {self._rejoin_timeout_s:g} s)")
            await asyncio.sleep(_POLL_S)

    async def _generate_on(self, replica: Replica, unfinished: UnfinishedRequest) -> Completion | str:
        """Return the completion, or the reason why the replica was drained."""
        with self._pool.lock:
            engine, generation, lost = replica.engine, replica.generation, unfinished.lost
        assert engine is not None
        assert lost is not None
        task = asyncio.ensure_future(_unless_aborted(unfinished, engine))
        try:
            await self._watch(task, lost, replica, generation)
            if not task.done():
                return lost.result()
            if task.cancelled():  # by the engine, which was closed
                raise WorkerError("it gave up the request")
            completion = task.result()
        except WorkerError as error:
            if lost.done():
                return lost.result()
            self._drain(replica, generation, str(error))
            return str(error)
        except EngineError:
            with self._pool.lock:
                drained = replica.generation != generation
            if not drained:
                raise
            return await lost  # the engine was closed while it had the request, and refused it therefore
        finally:
            await _cancel(task, wait=not lost.done())  # without `lost`, the caller cancels
        with self._pool.lock:
            self._pool.balance.finish(unfinished)
            replica.progress = time.monotonic()
        return completion

    async def _watch(
        self, task: asyncio.Future[Completion], lost: asyncio.Future[str], replica: Replica, generation: int
    ) -> None:
        """Wait until ``task`` is done or the replica is lost; drain the replica if it stalls."""
        either: set[asyncio.Future[Any]] = {task, lost}
        limit = self._stall_timeout_s
        while not task.done() and not lost.done():
            await asyncio.wait(
                either, timeout=None if limit is None else limit / 4, return_when=asyncio.FIRST_COMPLETED
            )
            if not task.done() and limit is not None and self._pool.stalled(replica, limit):
                self._drain(replica, generation, f"it finished nothing within {limit:g} s")
        if not task.done():
            await asyncio.wait({task}, timeout=_LATE_RESULT_S)


async def _unless_aborted(unfinished: UnfinishedRequest, engine: RolloutEngine) -> Completion:
    if unfinished.aborted:
        return Completion([], [], "abort", request_id=unfinished.request.request_id)
    return await engine.generate(unfinished.request)


async def _cancel(task: asyncio.Future[Completion], *, wait: bool) -> None:
    if task.done():
        return
    task.add_done_callback(_retrieve_exception)
    task.cancel()
    if wait:  # the engine forgets the request before the caller goes on
        await asyncio.wait({task}, timeout=_CANCEL_TIMEOUT_S)


def _retrieve_exception(task: asyncio.Future[Completion]) -> None:
    if not task.cancelled():
        task.exception()  # otherwise asyncio logs it as never retrieved
