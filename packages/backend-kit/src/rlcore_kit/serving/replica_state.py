"""State of the replicas behind `Replicas`: which take requests, which requests are unfinished, and which weights count.

Routing, control and lifecycle share one `ReplicaPool` and change it under its lock only.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlcore.engines.rollout import GenerationRequest, RolloutEngine
from rlcore.errors import EngineError
from rlcore_kit.serving.request_balance import Balance

Factory = Callable[[], RolloutEngine]
State = Literal["up", "stale", "down"]


@dataclass(eq=False)
class Replica:
    """One replica.

    Attributes:
        index: position among the replicas, the key in `Balance`.
        factory: builds the engine; None if the engine was given and cannot be rebuilt.
        state: "up" takes requests; "stale" runs, but holds other weights and waits for `Replicas.update_weights`;
            "down" has no usable engine and is rebuilt if it has a factory.
        reason: why the replica takes no requests; empty while it does.
        generation: incremented when an engine is given up, so that a late failure of it is not attributed to its
            successor.
        progress: time at which the replica last finished a request, or began to work.
    """

    index: int
    name: str
    factory: Factory | None
    engine: RolloutEngine | None = None
    state: State = "down"
    reason: str = "it was never started"
    generation: int = 0
    progress: float = 0.0


@dataclass(eq=False)
class UnfinishedRequest:
    """A request that `Replicas.generate` has not answered yet.

    Attributes:
        lost: set to the reason when the replica that generates it is drained.
        aborted: by the caller.
    """

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    lost: asyncio.Future[str] | None = None
    aborted: bool = False

    @property
    def cost(self) -> int:
        """Tokens that the request may occupy: prompt plus maximum completion."""
        return len(self.request.prompt) + self.request.sampling.max_tokens

    def lose(self, reason: str) -> None:
        """Tell the waiting coroutine, from any thread, that its replica was drained."""
        if self.lost is not None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self.loop.call_soon_threadsafe(_set_once, self.lost, reason)


class Target(NamedTuple):
    """A replica with the engine and generation that it had when an operation began."""

    replica: Replica
    engine: RolloutEngine
    generation: int


class ReplicaPool:
    """All replicas of one `Replicas`, with what they share.

    Attributes:
        lock: held while anything below is read together or changed; never held while an engine is called.
        update_lock: held while weights change or a replica joins; acquired before ``lock``.
        version: version of the weights that replicas in state "up" hold.
        paused, asleep, updating: while one of them is true, replicas finish no requests.
        closed: set once `Replicas.close` was called.
    """

    def __init__(self, entries: Sequence[RolloutEngine | Factory], names: Sequence[str], slack: float) -> None:
        self.replicas = [
            Replica(index, name, None, entry) if isinstance(entry, RolloutEngine) else Replica(index, name, entry)
            for index, (name, entry) in enumerate(zip(names, entries, strict=True))
        ]
        self.balance = Balance(slack)
        self.unfinished: set[UnfinishedRequest] = set()
        self.version = 0
        self.paused = self.asleep = self.updating = False
        self.lock = threading.RLock()
        self.update_lock = threading.Lock()
        self.closed = threading.Event()

    def targets(self, states: Iterable[State]) -> dict[int, Target]:
        """Return the replicas in one of ``states`` by index."""
        with self.lock:
            return {
                replica.index: Target(replica, replica.engine, replica.generation)
                for replica in self.replicas
                if replica.state in states and replica.engine is not None
            }

    def reasons(self) -> dict[str, str]:
        """Return why each replica that takes no requests does not, by name."""
        with self.lock:
            return {replica.name: replica.reason for replica in self.replicas if replica.state != "up"}

    def can_recover(self) -> bool:
        """Return whether a replica that is down is being rebuilt."""
        with self.lock:
            rebuilding = any(replica.factory and replica.state == "down" for replica in self.replicas)
            return rebuilding and not self.closed.is_set()

    def none_left(self, waited: str = "") -> EngineError:
        """Return the error for a request or an update that no replica can take."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.reasons().items())
        return EngineError(f"no rollout replica is left{waited}: {reasons}")

    def check_versions(self, versions: Mapping[str, int]) -> None:
        """Raise `EngineError` unless all ``versions``, by name of replica, are the pool's."""
        if any(version != self.version for version in versions.values()):
            text = ", ".join(f"{name} has {version}" for name, version in versions.items())
            raise EngineError(f"the rollout replicas do not hold weights of one version: {text}; update their weights")

    def restart_stall_timers(self) -> None:
        """Make time that was spent paused, asleep or updating not count as stalled."""
        with self.lock:
            for replica in self.replicas:
                replica.progress = time.monotonic()

    def stalled(self, replica: Replica, timeout_s: float) -> bool:
        """Return whether ``replica`` should have finished a request within the last ``timeout_s`` seconds."""
        with self.lock:
            idle = self.paused or self.asleep or self.updating
            return not idle and time.monotonic() - replica.progress > timeout_s


def _set_once(lost: asyncio.Future[str], reason: str) -> None:
    if not lost.done():
        lost.set_result(reason)
