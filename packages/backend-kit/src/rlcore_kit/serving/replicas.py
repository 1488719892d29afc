"""`Replicas`: several rollout engines behind one, which outlive each other.

A `WorkerError` of a replica means the replica: it is drained, what it had not finished is made by the others with the
same seeds, and its factory builds it anew in the background. An `EngineError` means the request, and goes to whoever
made it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from rlcore.engines.rollout import Completion, GenerationRequest, RolloutEngine
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError, RlcoreError, WorkerError
from rlcore_kit.serving.fan_out import StreamBroke, update_all
from rlcore_kit.serving.request_balance import Balance
from rlcore_kit.serving.threaded_calls import ThreadedCall, failures_of

logger = logging.getLogger(__name__)

Factory = Callable[[], RolloutEngine]

_FIRST_RETRY_S = 1.0
_LONGEST_RETRY_S = 30.0
_SEED_BITS = 63  # what any backend's generator takes
_LATE_S = 0.1  # what a drained replica has finished may just be on its way here
_CANCEL_S = 5.0  # longest wait for an engine to forget a cancelled request
_LOOK_S = 0.2  # how often a request without any replica looks for one


@dataclass(eq=False)
class _Replica:
    """One replica; everything is changed under the lock of `Replicas`.

    Attributes:
        state: "up" takes requests; "stale" lives, but with other weights, and waits for `update_weights`; "down" is
            gone, and under repair if it has a factory.
        life: counts the engines that it had, so that an old one's failure is not laid to the new one.
        progress: when it last finished something, or began to work.
    """

    name: str
    factory: Factory | None
    engine: RolloutEngine | None = None
    state: Literal["up", "stale", "down"] = "down"
    reason: str = "it was never started"
    life: int = 0
    progress: float = 0.0

    def build(self) -> None:
        if self.factory is not None:
            self.engine = self.factory()


@dataclass(eq=False)
class _Call:
    """One unfinished request, wherever it is made."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    lost: asyncio.Future[str] | None = None  # why the replica that makes it was drained
    aborted: bool = False


class Replicas(RolloutEngine):
    """Spreads requests over replicas by outstanding tokens, groups together; see `Balance`.

    Methods may be called from any thread. Calls to the replicas' control methods are made from threads of their own. A
    request without a seed is given one: replicas that were started alike would draw the same.

    Args:
        replicas: engines, or what builds them. Only what has a factory is built anew.
        names: for messages, e.g. URLs.
        refresh: gives an engine that was built anew the current weights. Without it, or if it fails, an engine whose
            ``version`` is not the current one waits for the next `update_weights`.
        seed: of the seeds of requests that have none.
        slack: see `Balance`.
        attempts: replicas that may die of one request before it is given up.
        timeout_s: longest wait for a replica to do anything but generate, and for a bucket of weights.
        start_together: build all at once, in threads: for replicas in processes or on machines of their own. One after
            the other is for models that are loaded in this process, which threads cannot do at the same time.
        start_timeout_s: longest wait for replicas that start together.
        stall_timeout_s: a replica that has requests, is not paused and finishes none for so long is taken for hung;
            None leaves it to the engines.
        rejoin_timeout_s: longest wait of a request for a replica to come back when none is left.

    Raises:
        EngineError: some could not be built, or do not hold the same weights.
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
        self._replicas = [
            _Replica(name, None, entry) if isinstance(entry, RolloutEngine) else _Replica(name, entry)
            for name, entry in zip(names, replicas, strict=True)
        ]
        self._refresh, self._attempts = refresh, attempts
        self._timeout_s, self._stall_s, self._rejoin_s = timeout_s, stall_timeout_s, rejoin_timeout_s
        self._balance = Balance(slack)
        self._seeds = random.Random(seed)
        self._calls: set[_Call] = set()
        self._version = 0
        self._paused = self._asleep = self._updating = False
        self._lock = threading.RLock()
        self._updates = threading.Lock()  # held while weights change or a replica joins; before self._lock
        self._closed = threading.Event()
        self._start(start_together, start_timeout_s)

    @property
    def version(self) -> int:
        """What all replicas attest.

        Raises:
            EngineError: they do not attest the same.
        """
        with self._lock:
            if not self._updating:
                self._check_versions({r.name: r.engine.version for r in self._replicas if r.state == "up" and r.engine})
            return self._version

    @property
    def shares_weights(self) -> bool:
        return all(r.engine is not None and r.engine.shares_weights for r in self._replicas)

    @property
    def takes_adapters(self) -> bool:
        return any(r.engine is not None and r.engine.takes_adapters for r in self._replicas)

    @property
    def reasons(self) -> dict[str, str]:
        """Why each replica that takes no requests does not, by name."""
        with self._lock:
            return {r.name: r.reason for r in self._replicas if r.state != "up"}

    # --- generating --------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Completion:
        """Make one completion, on another replica if the first dies.

        Raises:
            EngineError: the request is impossible, several replicas died of it, or no replica is left; the message
                then names each and why.
        """
        with self._lock:
            if request.sampling.seed is None:
                seed = self._seeds.getrandbits(_SEED_BITS)
                request = replace(request, sampling=replace(request.sampling, seed=seed))
            call = _Call(request, asyncio.get_running_loop())
            self._asleep = False
            self._calls.add(call)
        deaths: list[str] = []
        try:
            while True:
                replica = await self._place(call)
                if replica is None:
                    return Completion([], [], "abort", request_id=request.request_id)
                made = await self._generate_on(replica, call)
                if isinstance(made, Completion):
                    return made
                deaths.append(f"{replica.name}: {made}")
                if len(deaths) >= self._attempts:
                    raise EngineError(
                        f"request {request.request_id!r} was given up after {len(deaths)} replicas failed at it: "
                        + "; ".join(deaths)
                    )
        finally:
            with self._lock:
                self._balance.finish(call)
                self._calls.discard(call)

    async def _place(self, call: _Call) -> _Replica | None:
        """The replica that shall make it, as soon as there is one; None if it was aborted meanwhile."""
        request = call.request
        cost = len(request.prompt) + request.sampling.max_tokens
        deadline = time.monotonic() + self._rejoin_s
        while True:
            with self._lock:
                if call.aborted:
                    return None
                index = self._balance.assign(call, cost, request.group)
                if index is not None:
                    replica = self._replicas[index]
                    if self._balance.load(index) == cost:  # it was idle
                        replica.progress = time.monotonic()
                    call.lost = call.loop.create_future()
                    return replica
                if self._closed.is_set() or not any(r.factory and r.state == "down" for r in self._replicas):
                    raise self._none_left()
            if time.monotonic() > deadline:
                raise self._none_left(f" (none came back within {self._rejoin_s:g} s)")
            await asyncio.sleep(_LOOK_S)

    async def _generate_on(self, replica: _Replica, call: _Call) -> Completion | str:
        """The completion, or why the replica was drained."""
        with self._lock:
            engine, life, lost = replica.engine, replica.life, call.lost
        assert engine is not None
        assert lost is not None
        making = asyncio.ensure_future(_unless_aborted(call, engine))
        either: set[asyncio.Future[Any]] = {making, lost}
        patience = None if self._stall_s is None else self._stall_s / 4
        try:
            while not making.done() and not lost.done():
                await asyncio.wait(either, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if not making.done():
                    self._check_stall(replica, life)
            if not making.done():
                await asyncio.wait({making}, timeout=_LATE_S)
            if not making.done():
                return lost.result()
            if making.cancelled():  # by the engine, which was closed
                raise WorkerError("it gave up the request")
            completion = making.result()
        except WorkerError as error:
            if lost.done():
                return lost.result()
            self._drain(replica, life, str(error))
            return str(error)
        except EngineError:
            with self._lock:
                drained = replica.life != life
            if not drained:
                raise
            return await lost  # the engine refused because it was closed under the request
        finally:
            if not making.done():
                making.add_done_callback(_forget)
                making.cancel()
                if not lost.done():  # it is the caller who cancels: the engine forgets the request before we return
                    await asyncio.wait({making}, timeout=_CANCEL_S)
        with self._lock:
            self._balance.finish(call)
            replica.progress = time.monotonic()
        return completion

    def _check_stall(self, replica: _Replica, life: int) -> None:
        if self._stall_s is None:
            return
        with self._lock:
            standing = self._paused or self._asleep or self._updating
            stalled = not standing and time.monotonic() - replica.progress > self._stall_s
        if stalled:
            self._drain(replica, life, f"it finished nothing within {self._stall_s:g} s")

    # --- control -----------------------------------------------------------------------------------------------------

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        """Give all replicas the weights, bucket by bucket, and let those that waited for them join.

        A replica that fails is drained. ``buckets`` are taken to their end in the caller's thread whatever happens.

        Raises:
            EngineError: no replica took them.
        """
        with self._updates:
            with self._lock:
                targets = {
                    index: (r, r.engine, r.life)
                    for index, r in enumerate(self._replicas)
                    if r.state != "down" and r.engine is not None
                }
                self._updating = True
            try:
                engines = {index: (r.name, engine) for index, (r, engine, _) in targets.items()}
                failures = update_all(engines, buckets, version, self._timeout_s)
                for index, error in failures.items():
                    replica, _, life = targets[index]
                    self._drain(replica, life, f"it did not take version {version}: {error}", _after(error))
                taken = [entry for index, entry in targets.items() if index not in failures]
                if not taken:
                    users = [error for error in failures.values() if isinstance(error, RlcoreError)]
                    raise users[0] if users else self._none_left()
                with self._lock:
                    self._version = version
                    self._balance.forget_groups()
                for replica, _, life in taken:
                    self._join_or_drain(replica, life)
            except StreamBroke as broken:
                for index, error in broken.failures.items():
                    replica, _, life = targets[index]
                    self._drain(replica, life, f"its update to version {version} broke off: {error}", "stale")
                raise broken.error from None
            finally:
                self._updating = False
                self._touch()

    def pause(self) -> None:
        with self._lock:
            self._paused = True
        self._each("pause", lambda engine: engine.pause())

    def resume(self) -> None:
        self._each("resume", lambda engine: engine.resume())
        with self._lock:
            self._paused = False
            self._touch()

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        with self._lock:
            for call in self._calls:
                if request_ids is None or call.request.request_id in request_ids:
                    call.aborted = True
        self._each("abort", lambda engine: engine.abort(request_ids))

    def sleep(self) -> None:
        with self._lock:
            self._asleep = True
        self._each("sleep", lambda engine: engine.sleep())

    def wake(self) -> None:
        self._each("wake up", lambda engine: engine.wake())
        with self._lock:
            self._asleep = False
            self._touch()

    def close(self) -> None:
        """Close all replicas; what they say about it is only logged."""
        self._closed.set()
        with self._lock:
            engines = {index: r.engine for index, r in enumerate(self._replicas) if r.engine is not None}
            for replica in self._replicas:
                replica.engine, replica.state, replica.reason = None, "down", "it was closed"
        threads = {index: ThreadedCall("closing", engine.close) for index, engine in engines.items()}
        for index, error in failures_of(threads, self._timeout_s, "close").items():
            logger.warning("%s: %s", self._replicas[index].name, error)

    def _each(self, what: str, act: Callable[[RolloutEngine], None]) -> None:
        """Do it on all replicas that take requests; one that fails is drained.

        Raises:
            RlcoreError: what the first replica refused, after all were asked.
        """
        with self._lock:
            targets = {
                index: (r, r.engine, r.life)
                for index, r in enumerate(self._replicas)
                if r.state == "up" and r.engine is not None
            }
        threads = {
            index: ThreadedCall(f"{what} {replica.name}", partial(act, engine))
            for index, (replica, engine, _) in targets.items()
        }
        refused: RlcoreError | None = None
        for index, error in failures_of(threads, self._timeout_s, what).items():
            if isinstance(error, RlcoreError):
                refused = refused or error
            else:
                replica, _, life = targets[index]
                self._drain(replica, life, f"it did not {what}: {error}")
        if refused is not None:
            raise refused

    # --- coming and going --------------------------------------------------------------------------------------------

    def _start(self, together: bool, timeout_s: float) -> None:
        """Build all replicas; all must work."""
        failures: dict[int, Exception] = {}
        if together:
            threads = {index: ThreadedCall(f"start {r.name}", r.build) for index, r in enumerate(self._replicas)}
            failures = failures_of(threads, timeout_s, "start")
        else:
            for index, replica in enumerate(self._replicas):
                try:
                    replica.build()
                except Exception as error:
                    failures[index] = error
                    break
        try:
            if len(self._replicas) == 1 and isinstance(failures.get(0), RlcoreError):
                raise failures[0]
            if failures:
                named = (f"{self._replicas[index].name}: {error}" for index, error in failures.items())
                raise EngineError(
                    f"{len(failures)} of {len(self._replicas)} rollout replicas did not start: " + "; ".join(named)
                )
            versions = {r.name: r.engine.version for r in self._replicas if r.engine is not None}
            self._version = next(iter(versions.values()))
            self._check_versions(versions)
        except BaseException:
            self.close()
            raise
        for replica in self._replicas:
            self._join(replica)

    def _check_versions(self, versions: Mapping[str, int]) -> None:
        if any(version != self._version for version in versions.values()):
            text = ", ".join(f"{name} has {version}" for name, version in versions.items())
            raise EngineError(f"the rollout replicas do not hold weights of one version: {text}; update their weights")

    def _join(self, replica: _Replica) -> None:
        """Let it take requests, in the state in which the others are."""
        with self._lock:
            if replica.state == "up" or replica.engine is None or self._closed.is_set():
                return
            engine, paused, asleep = replica.engine, self._paused, self._asleep
        if paused:
            engine.pause()
        if asleep:
            engine.sleep()
        with self._lock:
            if self._closed.is_set() or replica.engine is not engine:
                return
            replica.state, replica.reason, replica.progress = "up", "", time.monotonic()
            self._balance.add(self._replicas.index(replica))
            changed = self._paused != paused
            paused = self._paused
        if changed:
            engine.pause() if paused else engine.resume()

    def _join_or_drain(self, replica: _Replica, life: int) -> None:
        try:
            self._join(replica)
        except WorkerError as error:
            self._drain(replica, life, f"it could not join the others: {error}")

    def _drain(self, replica: _Replica, life: int, reason: str, state: Literal["stale", "down"] = "down") -> None:
        """Give it nothing any more, and what it was at to the others."""
        with self._lock:
            if replica.life != life or replica.state == "down":
                return
            engine = replica.engine
            replica.state, replica.reason = state, reason
            if state == "down":
                replica.engine, replica.life = None, life + 1
            orphans = self._balance.remove(self._replicas.index(replica))
            for call in orphans:
                assert isinstance(call, _Call)
                if call.lost is not None:
                    with contextlib.suppress(RuntimeError):  # its event loop is closed
                        call.loop.call_soon_threadsafe(_settle, call.lost, reason)
            closed = self._closed.is_set()
        logger.warning("%s is drained, %d requests go to other replicas: %s", replica.name, len(orphans), reason)
        if state == "down" and not closed:
            threading.Thread(
                target=self._replace, args=(replica, engine), name=f"replace {replica.name}", daemon=True
            ).start()

    def _replace(self, replica: _Replica, old: RolloutEngine | None) -> None:
        """Close what is left of it, and build it anew until that works."""
        if old is not None:
            with contextlib.suppress(Exception):  # it is broken, and why is known
                old.close()
        wait = _FIRST_RETRY_S
        while replica.factory is not None and not self._closed.is_set():
            try:
                engine = replica.factory()
                self._admit(replica, engine)
                return
            except Exception as error:
                with self._lock:
                    replica.reason = f"{replica.reason.split(_AGAIN)[0]}{_AGAIN}{error}"
                    if replica.state == "down":
                        replica.engine = None
                self._closed.wait(wait)
                wait = min(2 * wait, _LONGEST_RETRY_S)

    def _admit(self, replica: _Replica, engine: RolloutEngine) -> None:
        """Have it join with the current weights, or wait for the next ones."""
        with self._updates:
            version, refused = self._version, ""
            if engine.version != version and self._refresh is not None:
                try:
                    self._refresh(engine)
                except Exception as error:
                    refused = f" ({error})"
            found = engine.version
            with self._lock:
                closed = self._closed.is_set()
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

    def _none_left(self, waited: str = "") -> EngineError:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
        return EngineError(f"no rollout replica is left{waited}: {reasons}")

    def _touch(self) -> None:
        """What stood still until now was not hung."""
        with self._lock:
            for replica in self._replicas:
                replica.progress = time.monotonic()


_AGAIN = "; started anew, it failed: "


def _after(error: Exception) -> Literal["stale", "down"]:
    """What a replica is after an update that failed so: one that refused it lives, and may take the next."""
    return "stale" if isinstance(error, RlcoreError) else "down"


async def _unless_aborted(call: _Call, engine: RolloutEngine) -> Completion:
    if call.aborted:
        return Completion([], [], "abort", request_id=call.request.request_id)
    return await engine.generate(call.request)


def _settle(lost: asyncio.Future[str], reason: str) -> None:
    if not lost.done():
        lost.set_result(reason)


def _forget(task: asyncio.Future[Completion]) -> None:
    if not task.cancelled():
        task.exception()  # so that asyncio does not report it
