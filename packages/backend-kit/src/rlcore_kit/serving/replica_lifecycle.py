"""Lifecycle of replicas: start, join, drain, rebuild, close."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from rlcore.engines.rollout import RolloutEngine
from rlcore.errors import EngineError, RlcoreError, WorkerError
from rlcore_kit.serving.replica_state import Replica, ReplicaPool, State, Target, UnfinishedRequest
from rlcore_kit.serving.threaded_calls import ThreadedCall, failures_of

logger = logging.getLogger(__name__)

_FIRST_RETRY_S = 1.0
_MAXIMUM_RETRY_S = 30.0
_RESTART_FAILED = "; its restart failed: "


class ReplicaLifecycle:
    """Starts, drains, rebuilds and closes the replicas of ``pool``.

    Args:
        refresh: gives a rebuilt engine the current weights; None if nothing can.
    """

    def __init__(self, pool: ReplicaPool, refresh: Callable[[RolloutEngine], None] | None) -> None:
        self._pool, self._refresh = pool, refresh

    def start(self, *, together: bool, timeout_s: float) -> None:
        """Build all replicas and let them take requests.

        Raises:
            EngineError: a replica did not start, or they hold weights of several versions; `close` them then.
        """
        pool = self._pool
        failures = self._build_all(together, timeout_s)
        if len(pool.replicas) == 1 and isinstance(failures.get(0), RlcoreError):
            raise failures[0]
        if failures:
            named = (f"{pool.replicas[index].name}: {error}" for index, error in failures.items())
            raise EngineError(
                f"{len(failures)} of {len(pool.replicas)} rollout replicas did not start: " + "; ".join(named)
            )
        versions = {r.name: r.engine.version for r in pool.replicas if r.engine is not None}
        pool.version = next(iter(versions.values()))
        pool.check_versions(versions)
        for replica in pool.replicas:
            self._join(replica)

    def _build_all(self, together: bool, timeout_s: float) -> dict[int, Exception]:
        if together:
            threads = {
                replica.index: ThreadedCall(f"start {replica.name}", partial(self._build, replica))
                for replica in self._pool.replicas
            }
            return failures_of(threads, timeout_s, "start")
        for replica in self._pool.replicas:
            try:
                self._build(replica)
            except Exception as error:
                return {replica.index: error}
        return {}

    def _build(self, replica: Replica) -> None:
        """Build the engine of ``replica``; close it immediately if the replicas were closed in the meantime."""
        if replica.factory is None:
            return
        engine = replica.factory()
        with self._pool.lock:
            closed = self._pool.closed.is_set()
            if not closed:
                replica.engine = engine
        if closed:
            engine.close()

    def join(self, target: Target) -> None:
        """Let a replica that holds the current weights take requests; drain it if it fails to."""
        try:
            self._join(target.replica)
        except WorkerError as error:
            self.drain(target.replica, target.generation, f"it could not join the others: {error}")

    def _join(self, replica: Replica) -> None:
        """Bring an engine into the state of the others (paused, asleep) and let it take requests."""
        pool = self._pool
        with pool.lock:
            if replica.state == "up" or replica.engine is None or pool.closed.is_set():
                return
            engine, generation, paused, asleep = replica.engine, replica.generation, pool.paused, pool.asleep
        if paused:
            engine.pause()
        if asleep:
            engine.sleep()
        with pool.lock:
            if pool.closed.is_set() or replica.engine is not engine:
                return
            replica.state, replica.reason, replica.progress = "up", "", time.monotonic()
            pool.balance.add(replica.index)
            changed = pool.paused != paused
            paused = pool.paused
        if changed:
            try:
                engine.pause() if paused else engine.resume()
            except Exception as error:  # requests may have arrived already
                self.drain(replica, generation, f"it could not join the others: {error}")

    def drain(self, replica: Replica, generation: int, reason: str, state: State = "down") -> None:
        """Stop routing requests to ``replica`` and let other replicas take over its unfinished ones.

        Nothing happens if the engine of ``generation`` was given up before. In state "down" the engine is closed, and
        the replica is rebuilt in the background if it has a factory.
        """
        pool = self._pool
        with pool.lock:
            if replica.generation != generation or replica.state == "down":
                return
            engine = replica.engine
            replica.state, replica.reason = state, reason
            if state == "down":
                replica.engine, replica.generation = None, generation + 1
            orphans = pool.balance.remove(replica.index)
            for unfinished in orphans:
                assert isinstance(unfinished, UnfinishedRequest)
                unfinished.lose(reason)
            closed = pool.closed.is_set()
        logger.warning("%s is drained, %d requests go to other replicas: %s", replica.name, len(orphans), reason)
        if state == "down" and not closed:
            threading.Thread(
                target=self._replace, args=(replica, engine), name=f"replace {replica.name}", daemon=True
            ).start()

    def _replace(self, replica: Replica, old: RolloutEngine | None) -> None:
        """Close the engine that failed and build another one, retrying until that succeeds."""
        if old is not None:
            _close_quietly(old)
        wait = _FIRST_RETRY_S
        while replica.factory is not None and not self._pool.closed.is_set():
            engine: RolloutEngine | None = None
            try:
                engine = replica.factory()
                self._admit(replica, engine)
                return
            except Exception as error:
                with self._pool.lock:
                    if replica.state == "down":
                        replica.engine = None
                        replica.reason = f"{replica.reason.split(_RESTART_FAILED)[0]}{_RESTART_FAILED}{error}"
                if engine is not None:
                    _close_quietly(engine)
                self._pool.closed.wait(wait)
                wait = min(2 * wait, _MAXIMUM_RETRY_S)

    def _admit(self, replica: Replica, engine: RolloutEngine) -> None:
        """Let a rebuilt engine join with the current weights, or mark it as waiting for the next update."""
        pool = self._pool
        with pool.update_lock:
            version, refused = pool.version, ""
            if engine.version != version and self._refresh is not None:
                try:
                    self._refresh(engine)
                except Exception as error:
                    refused = f" ({error})"
            found = engine.version
            with pool.lock:
                closed = pool.closed.is_set()
                if not closed:
                    replica.engine = engine
                if not closed and found != version:
                    replica.state = "stale"
                    replica.reason = (
                        f"it is back with weights of version {found}, not {version}{refused}, and joins at the next "
                        f"update_weights; it was drained because {replica.reason}"
                    )
                    logger.warning("%s: %s", replica.name, replica.reason)
                    return
            if closed:
                engine.close()
                return
            self._join(replica)
        logger.warning("%s is back", replica.name)

    def close(self, timeout_s: float) -> None:
        """Close all engines; failures are logged."""
        pool = self._pool
        pool.closed.set()
        with pool.lock:
            engines = {r.index: r.engine for r in pool.replicas if r.engine is not None}
            for replica in pool.replicas:
                replica.engine, replica.state, replica.reason = None, "down", "it was closed"
        threads = {index: ThreadedCall("closing", engine.close) for index, engine in engines.items()}
        for index, error in failures_of(threads, timeout_s, "close").items():
            logger.warning("%s: %s", pool.replicas[index].name, error)


def _close_quietly(engine: RolloutEngine) -> None:
    with contextlib.suppress(Exception):  # the failure that led here is reported already
        engine.close()
