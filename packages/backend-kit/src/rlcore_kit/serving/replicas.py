"""`Replicas`: several rollout engines behind one interface; if one fails, the others take over its requests.

A `WorkerError` concerns the replica: it is drained, other replicas generate its unfinished requests with the same
seeds, and its factory rebuilds it in the background. An `EngineError` concerns the request and is raised to its caller.

Modules: `replica_state` (shared state), `replica_generation` (routing of requests), `replica_lifecycle` (start, drain,
rebuild, close).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, RlcoreError
from rlcore_kit.serving.fan_out import BrokenStream, update_all
from rlcore_kit.serving.replica_generation import RequestRouter
from rlcore_kit.serving.replica_lifecycle import ReplicaLifecycle
from rlcore_kit.serving.replica_state import Factory, ReplicaPool, State, Target
from rlcore_kit.serving.threaded_calls import ThreadedCall, failures_of

_POLL_S = 0.2


class Replicas(RolloutEngine):
    """Balances requests over replicas by outstanding tokens, and keeps groups together; see `Balance`.

    Methods may be called from any thread. Control methods of the replicas are called from separate threads. A request
    without a seed is given one: replicas that were started alike would draw the same tokens.

    Args:
        replicas: engines, or factories that build them. Only a replica with a factory is rebuilt after a failure.
        names: for messages, e.g. URLs.
        refresh: gives a rebuilt engine the current weights. Without it, or if it fails, an engine whose ``version`` is
            not the current one waits for the next `update_weights`.
        seed: of the generator of seeds for requests that have none.
        slack: see `Balance`.
        attempts: maximum number of replicas that may fail at one request before the request fails.
        timeout_s: timeout of every control method of a replica and of one bucket of weights.
        start_together: start all replicas concurrently, in threads, as is right for replicas in other processes or on
            other machines. Models that are loaded in this process must be started one after the other.
        start_timeout_s: timeout of a concurrent start.
        stall_timeout_s: a replica that has requests, is not paused and finishes none within this time is drained as
            hung; None leaves that to the engines.
        rejoin_timeout_s: timeout of a request that waits for a replica to come back when none is left.

    Raises:
        EngineError: a replica could not be built, or replicas hold weights of several versions.
    """

    def __init__(
        self,
        replicas: Sequence[RolloutEngine | Factory],
        *,
        names: Sequence[str] | None = None,
        refresh: Callable[[RolloutEngine], None] | None = None,
        seed: int = 0,
        slack: float = 16,
        attempts: int = 3,
        timeout_s: float = 300,
        start_together: bool = False,
        start_timeout_s: float = 1800,
        stall_timeout_s: float | None = None,
        rejoin_timeout_s: float = 300,
    ) -> None:
        if not replicas:
            raise EngineError("there must be at least one replica")
        names = names if names is not None else [f"replica {index}" for index in range(len(replicas))]
        self._pool = ReplicaPool(replicas, names, slack)
        self._timeout_s = timeout_s
        self._lifecycle = ReplicaLifecycle(self._pool, refresh)
        self._router = RequestRouter(
            self._pool,
            self._lifecycle.drain,
            seed=seed,
            attempts=attempts,
            stall_timeout_s=stall_timeout_s,
            rejoin_timeout_s=rejoin_timeout_s,
        )
        try:
            self._lifecycle.start(together=start_together, timeout_s=start_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """Version that all replicas attest.

        Raises:
            EngineError: replicas attest several versions.
        """
        pool = self._pool
        with pool.lock:
            if not pool.updating:
                pool.check_versions({r.name: r.engine.version for r in pool.replicas if r.state == "up" and r.engine})
            return pool.version

    @property
    def shares_weights(self) -> bool:
        """True if all replicas generate with the trainer's own tensors."""
        return all(r.engine is not None and r.engine.shares_weights for r in self._pool.replicas)

    @property
    def takes_adapters(self) -> bool:
        """True if updates bring adapters."""
        return any(r.engine is not None and r.engine.takes_adapters for r in self._pool.replicas)

    @property
    def engines(self) -> dict[str, RolloutEngine]:
        """The engines of replicas that are not down, by name."""
        with self._pool.lock:
            return {r.name: r.engine for r in self._pool.replicas if r.engine is not None}

    @property
    def reasons(self) -> dict[str, str]:
        """Why each replica that takes no requests does not, by name."""
        return self._pool.reasons()

    async def generate(self, request: GenerationRequest) -> Completion:
        """Generate one completion, on another replica if the first fails.

        Raises:
            EngineError: the request is impossible, several replicas failed at it, or no replica is left; the message
                then names each replica and its reason.
        """
        return await self._router.generate(request)

    def wait_until_running(self, timeout_s: float) -> None:
        """Wait until at least one replica is not down.

        Raises:
            EngineError: none is within ``timeout_s``, or the replicas were closed.
        """
        deadline = time.monotonic() + timeout_s
        while all(replica.state == "down" for replica in self._pool.replicas):
            if self._pool.closed.is_set() or time.monotonic() > deadline:
                raise self._pool.none_left(f" (none came back within {timeout_s:g} s)")
            time.sleep(_POLL_S)

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Give all replicas the weights, bucket by bucket; replicas that waited for weights join.

        A replica that fails is drained. ``buckets`` are consumed to the end in the caller's thread in any case.

        Raises:
            EngineError: no replica took the weights.
        """
        pool = self._pool
        with pool.update_lock:
            targets = pool.targets(("up", "stale"))
            pool.updating = True
            try:
                self._update(targets, buckets, version)
            except BrokenStream as broken:
                for index, error in broken.failures.items():
                    replica, _, generation = targets[index]
                    reason = f"its update to version {version} broke off: {error}"
                    self._lifecycle.drain(replica, generation, reason, "stale")
                raise broken.error from None
            finally:
                pool.updating = False
                pool.restart_stall_timers()

    def _update(self, targets: dict[int, Target], buckets: Iterable[WeightBucket], version: int) -> None:
        pool = self._pool
        engines = {index: (target.replica.name, target.engine) for index, target in targets.items()}
        failures = update_all(engines, buckets, version, self._timeout_s)
        for index, error in failures.items():
            replica, _, generation = targets[index]
            # an engine that refused the weights runs, and may take the next ones
            state: State = "stale" if isinstance(error, RlcoreError) else "down"
            self._lifecycle.drain(replica, generation, f"it did not take version {version}: {error}", state)
        updated = [target for index, target in targets.items() if index not in failures]
        if not updated:
            refusals = [error for error in failures.values() if isinstance(error, RlcoreError)]
            raise refusals[0] if refusals else pool.none_left()
        with pool.lock:
            pool.version = version
            pool.balance.forget_groups()
        for target in updated:
            self._lifecycle.join(target)

    def pause(self) -> None:
        """Pause all replicas."""
        with self._pool.lock:
            self._pool.paused = True
        self._call_all("pause", lambda engine: engine.pause())

    def resume(self) -> None:
        """Resume all replicas."""
        self._call_all("resume", lambda engine: engine.resume())
        with self._pool.lock:
            self._pool.paused = False
            self._pool.restart_stall_timers()

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """Abort unfinished requests (all by default) on every replica, and those that wait for one."""
        with self._pool.lock:
            for unfinished in self._pool.unfinished:
                if request_ids is None or unfinished.request.request_id in request_ids:
                    unfinished.aborted = True
        self._call_all("abort", lambda engine: engine.abort(request_ids))

    def sleep(self) -> None:
        """Release the device memory of all replicas."""
        with self._pool.lock:
            self._pool.asleep = True
        self._call_all("sleep", lambda engine: engine.sleep())

    def wake(self) -> None:
        """Undo `sleep`."""
        self._call_all("wake up", lambda engine: engine.wake())
        with self._pool.lock:
            self._pool.asleep = False
            self._pool.restart_stall_timers()

    def close(self) -> None:
        """Close all replicas; failures are logged."""
        self._lifecycle.close(self._timeout_s)

    def _call_all(self, what: str, act: Callable[[RolloutEngine], None]) -> None:
        """Call ``act`` with the engine of every replica that takes requests; drain a replica that fails.

        Raises:
            RlcoreError: the first refusal of a replica, after all were called.
        """
        targets = self._pool.targets(("up",))
        threads = {
            index: ThreadedCall(f"{what} {target.replica.name}", partial(act, target.engine))
            for index, target in targets.items()
        }
        refusal: RlcoreError | None = None
        for index, error in failures_of(threads, self._timeout_s, what).items():
            if isinstance(error, RlcoreError):
                refusal = refusal or error
            else:
                replica, _, generation = targets[index]
                self._lifecycle.drain(replica, generation, f"it did not {what}: {error}")
        if refusal is not None:
            raise refusal
