"""Several replicas behind one engine: load balancing, groups, failures, restarts, weights."""

import asyncio
import random
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore.engines import Completion, GenerationRequest, RolloutEngine, SamplingParams, WeightBucket
from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_kit.serving.fan_out import FanOut
from rlcore_kit.serving.replicas import Replicas
from rlcore_kit.serving.request_balance import Balance

WAIT_S = 60


class MemoryEngine(RolloutEngine):
    """An engine in memory: each token is drawn from seed, weights and preceding tokens.

    ``die`` makes it fail like an engine whose process is gone, ``hang`` makes it stand still.
    """

    def __init__(self, weights: float = 0.0) -> None:
        self.weights = weights
        self.dead: str | None = None
        self.hung = self.paused = self.asleep = self.closed = False
        self.seen: list[GenerationRequest] = []
        self.aborted: set[int] = set()
        self.running: dict[int, GenerationRequest] = {}
        self.failing_update: Exception | None = None
        self._version = 0

    @property
    def version(self) -> int:
        return self._version

    async def generate(self, request: GenerationRequest) -> Completion:
        self.asleep = False
        if not request.prompt:
            raise EngineError("empty prompt")
        self.seen.append(request)
        self.running[id(request)] = request
        tokens: list[int] = []
        versions: list[tuple[int, int]] = []
        try:
            while len(tokens) < request.sampling.max_tokens:
                await asyncio.sleep(0.001)
                if self.dead:
                    raise WorkerDied(self.dead)
                if id(request) in self.aborted:
                    return self._completion(request, tokens, "abort", versions)
                if self.hung or self.paused:
                    continue
                seed = (request.sampling.seed, tuple(request.prompt), tuple(tokens), self.weights)
                tokens.append(random.Random(repr(seed)).randrange(1000))
                last = versions[-1] if versions and versions[-1][0] == self._version else (self._version, 0)
                versions = [*(span for span in versions if span[0] != self._version), (self._version, last[1] + 1)]
            return self._completion(request, tokens, "length", versions)
        finally:
            self.running.pop(id(request), None)
            self.aborted.discard(id(request))

    def _completion(self, request, tokens, reason, versions) -> Completion:
        return Completion(tokens, [-1.0] * len(tokens), reason, versions, request.request_id)

    def update_weights(self, buckets, version: int) -> None:
        for bucket in buckets:
            self._work()
            for _, tensor in bucket.tensors:
                self.weights = float(tensor.sum())
        self._version = version

    def _work(self) -> None:
        if self.dead:
            raise WorkerDied(self.dead)
        if self.failing_update:
            raise self.failing_update
        while self.hung:
            time.sleep(0.01)

    def pause(self) -> None:
        self._work()
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def abort(self, request_ids=None) -> None:
        self._work()
        self.aborted |= {
            key for key, request in self.running.items() if request_ids is None or request.request_id in request_ids
        }

    def sleep(self) -> None:
        self._work()
        self.asleep = True

    def wake(self) -> None:
        self.asleep = False

    def close(self) -> None:
        self.closed = True


class Factory:
    """Builds engines; ``refuse`` makes it fail for the time being, ``die`` makes the engines fail."""

    def __init__(self) -> None:
        self.built: list[MemoryEngine] = []
        self.refuse: str | None = None
        self.die: str | None = None

    def __call__(self) -> MemoryEngine:
        if self.refuse:
            raise EngineError(self.refuse)
        self.built.append(MemoryEngine())
        self.built[-1].dead = self.die
        return self.built[-1]


def request(index: int = 0, max_tokens: int = 10, **changes) -> GenerationRequest:
    return GenerationRequest([5, 6, index], SamplingParams(max_tokens, seed=index), request_id=str(index), **changes)


def weights(value: float, buckets: int = 1) -> list[WeightBucket]:
    return [WeightBucket((("w", torch.tensor([value])),)) for _ in range(buckets)]


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, WAIT_S))


async def until(condition, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.01)


def expected(requests: list[GenerationRequest], value: float = 0.0) -> list[list[int]]:
    return [completion.tokens for completion in MemoryEngine(value).generate_batch(requests)]


# --- Balance ---------------------------------------------------------------------------------------------------------

steps = st.lists(
    st.one_of(
        st.tuples(st.just("assign"), st.integers(1, 500), st.one_of(st.none(), st.integers(0, 3))),
        st.tuples(st.just("finish"), st.integers(0, 60)),
        st.tuples(st.just("add"), st.integers(0, 4)),
        st.tuples(st.just("remove"), st.integers(0, 4)),
        st.tuples(st.just("forget")),
    ),
    max_size=80,
)


@settings(deadline=None)
@given(steps, st.sampled_from([0.0, 2.0, 16.0]))
def test_balance_equals_plain_bookkeeping(actions, slack):
    balance = Balance(slack)
    replicas: set[int] = set()
    running: dict[int, tuple[int, int]] = {}
    homes: dict[int, int] = {}

    def load(replica: int) -> int:
        return sum(cost for where, cost in running.values() if where == replica)

    for key, action in enumerate(actions):
        match action:
            case ("assign", cost, group):
                loads = {replica: load(replica) for replica in replicas}
                chosen = balance.assign(key, cost, group)
                assert (chosen is None) == (not replicas)
                if chosen is None:
                    continue
                home = homes.get(group) if group is not None else None
                if home is not None and loads[home] - min(loads.values()) <= slack * cost:
                    assert chosen == home
                else:
                    assert loads[chosen] == min(loads.values())
                running[key] = chosen, cost
                if group is not None:
                    homes[group] = chosen
            case ("finish", done):
                balance.finish(done)
                running.pop(done, None)
            case ("add", replica):
                balance.add(replica)
                replicas.add(replica)
            case ("remove", replica):
                orphans = {done for done, (where, _) in running.items() if where == replica}
                assert set(balance.remove(replica)) == orphans
                replicas.discard(replica)
                running = {done: entry for done, entry in running.items() if done not in orphans}
                homes = {group: home for group, home in homes.items() if home != replica}
            case ("forget",):
                balance.forget_groups()
                homes = {}
        assert set(balance.replicas) == replicas
        assert all(balance.load(replica) == load(replica) for replica in replicas)


def test_the_least_recently_used_group_is_forgotten():
    balance = Balance(slack=1000, max_groups=2)
    for replica in range(2):
        balance.add(replica)
    where = [balance.assign(group, 1, group) for group in range(3)]
    assert where == [0, 1, 0]
    balance.assign("load", 10)  # makes replica 1 the fuller one
    assert balance.load(1) > balance.load(0)
    assert balance.assign("again", 1, 1) == 1
    assert balance.assign("forgotten", 1, 0) == 0


# --- FanOut ----------------------------------------------------------------------------------------------------------


def test_at_most_two_buckets_exist_with_several_readers():
    alive: list[weakref.ref] = []
    most = 0

    def stream():
        nonlocal most
        for index in range(20):
            most = max(most, 1 + sum(ref() is not None for ref in alive))
            bucket = WeightBucket((("w", torch.full((4,), float(index))),))
            alive.append(weakref.ref(bucket))
            yield bucket
            del bucket

    fan_out = FanOut({0: "a", 1: "b", 2: "c"}, WAIT_S)
    found: dict[int, list[float]] = {0: [], 1: [], 2: []}

    def read(key: int) -> None:
        for bucket in fan_out.reader(key):
            time.sleep(0.001 * key)
            found[key].append(float(bucket.tensors[0][1][0]))

    threads = [threading.Thread(target=read, args=(key,)) for key in found]
    for thread in threads:
        thread.start()
    fan_out.feed(stream())
    for thread in threads:
        thread.join(WAIT_S)
    assert all(values == [float(index) for index in range(20)] for values in found.values())
    assert most <= 2


def test_a_stream_is_consumed_to_the_end_without_readers():
    made = []
    fan_out = FanOut({0: "slow"}, 0.05)
    fan_out.feed(made.append(index) or weights(index)[0] for index in range(3))
    assert made == [0, 1, 2]
    with pytest.raises(WorkerError, match=r"slow was dropped from the update: it did not take bucket 0 within 0\.05 s"):
        next(fan_out.reader(0))


def test_a_broken_stream_is_an_error_of_the_readers():
    fan_out = FanOut({0: "a"}, WAIT_S)
    caught = []

    def read() -> None:
        try:
            list(fan_out.reader(0))
        except WorkerError as error:
            caught.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()

    def stream():
        yield weights(1)[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fan_out.feed(stream())
    thread.join(WAIT_S)
    assert caught == ["the stream of weights broke: no more"]


# --- generation ------------------------------------------------------------------------------------------------------


def test_requests_are_spread_and_groups_stay_together():
    engines = [MemoryEngine() for _ in range(3)]
    with_groups = [request(index, group=index // 4) for index in range(24)]
    completions = Replicas(engines).generate_batch(with_groups)
    assert [completion.tokens for completion in completions] == expected(with_groups)
    assert [completion.request_id for completion in completions] == [entry.request_id for entry in with_groups]
    assert [len(engine.seen) for engine in engines] == [8, 8, 8]
    for group in range(6):
        assert sum(any(entry.group == group for entry in engine.seen) for engine in engines) == 1


def test_requests_without_a_seed_differ_between_replicas():
    engines = [MemoryEngine(), MemoryEngine()]
    unseeded = replace(request(), sampling=SamplingParams(10))
    completions = Replicas(engines).generate_batch([unseeded, unseeded])
    assert [len(engine.seen) for engine in engines] == [1, 1]
    assert completions[0].tokens != completions[1].tokens


def test_a_large_group_moves_to_other_replicas():
    engines = [MemoryEngine() for _ in range(2)]
    Replicas(engines, slack=4).generate_batch([request(index, group=0) for index in range(40)])
    assert min(len(engine.seen) for engine in engines) >= 15


def test_load_is_measured_in_tokens():
    engines = [MemoryEngine() for _ in range(2)]
    Replicas(engines).generate_batch([request(0, 200), *(request(index, 10) for index in range(1, 12))])
    assert [len(engine.seen) for engine in engines] == [1, 11]


def test_other_replicas_take_over_when_one_dies():
    """Finished completions are kept, the other replica generates the rest with the same seeds, and one is rebuilt."""
    factories = [Factory(), Factory()]
    replicas = Replicas(factories, names=["left", "right"])
    requests = [request(index, 3 if index < 4 else 60) for index in range(20)]

    async def scenario():
        running = [asyncio.create_task(replicas.generate(entry)) for entry in requests]
        await asyncio.gather(*running[:4])
        factories[0].built[0].dead = "the process got signal 9"
        completions = await asyncio.gather(*running)
        await until(lambda: not replicas.reasons, "the return of the replica")
        return completions

    completions = run(scenario())
    assert [completion.tokens for completion in completions] == expected(requests)
    seen = Counter(entry.request_id for factory in factories for engine in factory.built for entry in engine.seen)
    assert all(seen[str(index)] == 1 for index in range(4))
    assert {seen[str(index)] for index in range(4, 20)} == {1, 2}
    assert len(factories[0].built) == 2
    assert factories[0].built[0].closed
    before = len(factories[0].built[1].seen)
    replicas.generate_batch([request(index) for index in range(4)])
    assert len(factories[0].built[1].seen) == before + 2
    replicas.close()


def test_requests_that_a_closed_replica_refuses_go_to_another():
    """One request fails with the death; the engine is closed while it has the others, and refuses them."""

    class Dying(MemoryEngine):
        async def generate(self, request: GenerationRequest) -> Completion:
            if request.request_id == "0":
                raise WorkerDied("the process got signal 9")
            while not self.closed:
                await asyncio.sleep(0.001)
            raise EngineError("the engine is closed")

    built = [Dying]
    replicas = Replicas([lambda: built.pop()() if built else MemoryEngine(), Factory()])
    requests = [request(index) for index in range(8)]
    completions = replicas.generate_batch(requests)
    assert [completion.tokens for completion in completions] == expected(requests)
    replicas.close()


def test_requests_of_a_hung_replica_go_to_another():
    factories = [Factory(), Factory()]
    replicas = Replicas(factories, stall_timeout_s=0.5)
    factories[0].built[0].hung = True
    factories[0].refuse = "not yet"
    requests = [request(index) for index in range(6)]
    assert [completion.tokens for completion in replicas.generate_batch(requests)] == expected(requests)
    assert len(factories[1].built[0].seen) == 6
    assert "it finished nothing within 0.5 s" in replicas.reasons["replica 0"]
    replicas.close()


def test_a_paused_replica_does_not_count_as_hung():
    engines = [MemoryEngine(), MemoryEngine()]
    replicas = Replicas(engines, stall_timeout_s=0.4)

    async def scenario():
        running = asyncio.create_task(replicas.generate(request(max_tokens=20)))
        await asyncio.sleep(0.01)
        replicas.pause()
        await asyncio.sleep(1)
        replicas.resume()
        return await running

    assert len(run(scenario()).tokens) == 20
    assert replicas.reasons == {}


def test_requests_fail_if_no_replica_is_left():
    engines = [MemoryEngine(), MemoryEngine()]
    replicas = Replicas(engines, names=["http://a", "http://b"])
    engines[0].dead, engines[1].dead = "connection reset", "the process got signal 11"
    with pytest.raises(
        EngineError, match="no rollout replica is left: http://a: connection reset; http://b: the process got signal 11"
    ):
        replicas.generate_batch([request(index) for index in range(4)])


def test_requests_fail_if_no_replica_comes_back_in_time():
    factory = Factory()
    replicas = Replicas([factory], names=["only"], rejoin_timeout_s=0.5)
    factory.refuse = "connection refused"
    factory.built[0].dead = "connection reset"
    with pytest.raises(
        EngineError,
        match=r"no rollout replica is left \(none came back within 0\.5 s\): only: connection reset; "
        "its restart failed: connection refused",
    ):
        replicas.generate_batch([request()])
    replicas.close()


def test_a_request_waits_for_the_only_replica():
    factory = Factory()
    replicas = Replicas([factory])
    factory.built[0].dead = "connection reset"
    assert replicas.generate_batch([request()])[0].tokens == expected([request()])[0]
    replicas.close()


def test_a_request_that_kills_replicas_fails():
    class Fragile(MemoryEngine):
        async def generate(self, entry):
            if entry.request_id == "13":
                raise WorkerDied("out of memory")
            return await super().generate(entry)

    replicas = Replicas([Fragile] * 4, attempts=2)
    with pytest.raises(EngineError, match=r"request '13' was given up after 2 replicas failed at it: .*out of memory"):
        replicas.generate_batch([request(13)])
    replicas.close()


def test_an_impossible_request_drains_no_replica():
    engines = [MemoryEngine(), MemoryEngine()]
    replicas = Replicas(engines)
    with pytest.raises(EngineError, match="empty prompt"):
        replicas.generate_batch([replace(request(), prompt=[])])
    assert replicas.reasons == {}


def test_cancelled_requests_do_not_count_as_load():
    engines = [MemoryEngine(), MemoryEngine()]
    replicas = Replicas(engines)

    async def scenario():
        running = asyncio.create_task(replicas.generate(request(0, 100_000)))
        await until(lambda: engines[0].running, "the start")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not engines[0].running
        await replicas.generate(request(1))

    run(scenario())
    assert len(engines[0].seen) == 2


# --- control ---------------------------------------------------------------------------------------------------------


def test_abort_by_name_and_all():
    engines = [MemoryEngine(), MemoryEngine()]
    replicas = Replicas(engines)

    async def scenario():
        running = [asyncio.create_task(replicas.generate(request(index, 100_000))) for index in range(4)]
        await until(lambda: sum(len(engine.running) for engine in engines) == 4, "the start")
        await asyncio.sleep(0.05)
        replicas.abort(["1", "2"])
        await asyncio.gather(*running[1:3])
        assert not running[0].done()
        assert not running[3].done()
        replicas.abort()
        return await asyncio.gather(*running)

    for completion in run(scenario()):
        assert completion.finish_reason == "abort"
        assert completion.tokens


def test_an_aborted_request_is_not_retried():
    factories = [Factory()]
    replicas = Replicas(factories)

    async def scenario():
        running = asyncio.create_task(replicas.generate(request(0, 100_000)))
        await until(lambda: factories[0].built[0].running, "the start")
        factories[0].refuse = "not yet"
        factories[0].built[0].dead = "gone"
        await until(lambda: replicas.reasons, "the death")
        replicas.abort()
        return await running

    completion = run(scenario())
    assert (completion.finish_reason, completion.tokens) == ("abort", [])
    replicas.close()


def test_control_reaches_all_replicas_and_drains_those_that_fail():
    factories = [Factory(), Factory(), Factory()]
    replicas = Replicas(factories, names=["a", "b", "c"], timeout_s=0.5)
    engines = [factory.built[0] for factory in factories]
    engines[1].hung = True
    engines[2].dead = "killed"
    for factory in factories:
        factory.refuse = "not yet"
    replicas.pause()
    assert engines[0].paused
    assert "it did not pause within 0.5 s" in replicas.reasons["b"]
    assert "killed" in replicas.reasons["c"]
    factories[1].refuse = None
    deadline = time.monotonic() + WAIT_S
    while "b" in replicas.reasons:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert factories[1].built[1].paused, "a replica that joins paused ones must be paused"
    replicas.resume()
    assert not factories[1].built[1].paused
    replicas.sleep()
    assert engines[0].asleep
    assert factories[1].built[1].asleep
    replicas.wake()
    assert not engines[0].asleep
    engines[1].hung = False
    replicas.close()
    assert engines[0].closed


@pytest.mark.parametrize("together", [False, True])
def test_all_replicas_must_start(together):
    def broken():
        raise EngineError("no such model")

    first = MemoryEngine()
    with pytest.raises(EngineError, match="1 of 2 rollout replicas did not start: b: no such model"):
        Replicas([first, broken], names=["a", "b"], start_together=together)
    assert first.closed


def test_a_start_has_a_timeout():
    slow = threading.Event()
    with pytest.raises(EngineError, match=r"1 of 2 .* did not start: b: it did not start within 0\.2 s"):
        Replicas([MemoryEngine, slow.wait], names=["a", "b"], start_together=True, start_timeout_s=0.2)
    slow.set()


def test_the_error_of_a_single_replica_and_of_none():
    def broken():
        raise EngineError("no such model")

    with pytest.raises(EngineError, match=r"^no such model$"):
        Replicas([broken])
    with pytest.raises(EngineError, match="at least one"):
        Replicas([])


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_reach_all_replicas():
    engines = [MemoryEngine() for _ in range(3)]
    replicas = Replicas(engines)
    replicas.update_weights(iter(weights(2.5, 5)), 7)
    assert replicas.version == 7
    assert [(engine.version, engine.weights) for engine in engines] == [(7, 2.5)] * 3
    requests = [request(index) for index in range(6)]
    completions = replicas.generate_batch(requests)
    assert [completion.tokens for completion in completions] == expected(requests, 2.5)
    assert {span for completion in completions for span in completion.versions} == {(7, 10)}


def test_versions_that_differ_are_an_error():
    first, second = MemoryEngine(), MemoryEngine()
    second.update_weights(weights(1), 3)
    with pytest.raises(EngineError, match=r"do not hold weights of one version: .*replica 1 has 3"):
        Replicas([first, second])
    first.update_weights(weights(1), 3)
    replicas = Replicas([first, second])
    assert replicas.version == 3
    second.update_weights(weights(1), 4)
    with pytest.raises(EngineError, match="replica 0 has 3, replica 1 has 4"):
        _ = replicas.version


def test_a_replica_that_fails_an_update_is_drained():
    """The stream is consumed to the end, because other ranks of the trainer wait for that."""
    engines = [MemoryEngine() for _ in range(4)]

    class Deaf(MemoryEngine):
        def update_weights(self, buckets, version):
            for _ in buckets:
                pass

    class Lazy(MemoryEngine):
        def update_weights(self, buckets, version):
            next(iter(buckets))

    replicas = Replicas([*engines, Deaf(), Lazy()], names=["ok", "dead", "hung", "fails", "deaf", "lazy"], timeout_s=1)
    engines[1].dead, engines[2].hung, engines[3].failing_update = "killed", True, WorkerError("CUDA error")
    made = []
    replicas.update_weights((made.append(index) or weights(9.0)[0] for index in range(4)), 1)
    assert len(made) == 4
    assert replicas.version == 1
    reasons = replicas.reasons
    assert list(reasons) == ["dead", "hung", "fails", "deaf", "lazy"]
    assert "killed" in reasons["dead"]
    assert "within 1 s" in reasons["hung"]
    assert reasons["fails"] == "it did not take version 1: CUDA error"
    assert "attests version 0 after an update to 1" in reasons["deaf"]
    assert "did not take all buckets" in reasons["lazy"]
    assert replicas.generate_batch([request()])[0].versions == [(1, 10)]
    engines[2].hung = False


def test_an_update_that_all_refuse_fails():
    engine = MemoryEngine()
    replicas = Replicas([engine], names=["only"])
    engine.failing_update = EngineError("no tensor named w")
    with pytest.raises(EngineError, match=r"^no tensor named w$"):
        replicas.update_weights(weights(1.0), 1)
    engine.failing_update = None
    replicas.update_weights(weights(1.0), 1)
    assert replicas.version == 1


def test_a_failure_of_the_trainer_is_raised():
    def stream():
        yield weights(1.0)[0]
        raise RuntimeError("NaN in the weights")

    replicas = Replicas([MemoryEngine(), MemoryEngine()])
    with pytest.raises(RuntimeError, match="NaN in the weights"):
        replicas.update_weights(stream(), 1)
    with pytest.raises(EngineError, match=r"its update to version 1 broke off: .*NaN in the weights"):
        replicas.generate_batch([request()])  # it is unknown which weights they hold
    replicas.update_weights(weights(1.0), 1)
    assert replicas.generate_batch([request()])[0].versions == [(1, 10)]


def test_a_replica_with_old_weights_waits_for_the_next_update():
    factories = [Factory(), Factory()]
    replicas = Replicas(factories, names=["a", "b"])
    replicas.update_weights(weights(1.0), 1)
    factories[0].built[0].dead = "killed"

    async def scenario():
        await asyncio.gather(*(replicas.generate(request(index)) for index in range(4)))
        await until(lambda: "it is back" in replicas.reasons.get("a", ""), "the return")
        await asyncio.gather(*(replicas.generate(request(index)) for index in range(4)))

    run(scenario())
    assert "weights of version 0, not 1" in replicas.reasons["a"]
    assert "it was drained because killed" in replicas.reasons["a"]
    assert factories[0].built[1].seen == []
    replicas.update_weights(weights(2.0), 2)
    assert replicas.reasons == {}
    assert replicas.version == 2
    completions = replicas.generate_batch([request(index) for index in range(4)])
    assert {span for completion in completions for span in completion.versions} == {(2, 10)}
    assert len(factories[0].built[1].seen) == 2
    replicas.close()


def test_a_rebuilt_replica_gets_the_current_weights_before_requests():
    factories = [Factory(), Factory()]
    refreshed = []

    def refresh(engine) -> None:
        assert engine.seen == []
        refreshed.append(engine)
        engine.update_weights(weights(1.0), 1)

    replicas = Replicas(factories, refresh=refresh)
    replicas.update_weights(weights(1.0), 1)
    factories[0].built[0].dead = "killed"
    requests = [request(index) for index in range(8)]

    async def scenario():
        first = await asyncio.gather(*(replicas.generate(entry) for entry in requests))
        await until(lambda: not replicas.reasons, "the return")
        return [*first, *await asyncio.gather(*(replicas.generate(entry) for entry in requests))]

    assert [completion.tokens for completion in run(scenario())] == 2 * expected(requests, 1.0)
    assert refreshed == [factories[0].built[1]]
    assert factories[0].built[1].seen
    replicas.close()


def test_unfinished_requests_continue_with_new_weights():
    engines = [MemoryEngine(), MemoryEngine()]
    replicas = Replicas(engines)

    async def scenario():
        running = [asyncio.create_task(replicas.generate(request(index, 100_000))) for index in range(4)]
        await until(lambda: sum(len(engine.running) for engine in engines) == 4, "the start")
        await asyncio.sleep(0.05)
        replicas.update_weights(weights(1.0), 1)
        await asyncio.sleep(0.05)
        replicas.abort()
        return await asyncio.gather(*running)

    for completion in run(scenario()):
        assert [version for version, _ in completion.versions] == [0, 1]
        assert sum(count for _, count in completion.versions) == len(completion.tokens)


def test_no_request_is_lost_when_replicas_keep_dying():
    """Replicas die and come back; every request is answered once, with the tokens of its seed."""
    factories = [Factory() for _ in range(3)]
    replicas = Replicas(factories, attempts=50)
    requests = [request(index, 5 + index % 30, group=index // 4) for index in range(120)]
    dice = random.Random(0)

    async def scenario():
        running = asyncio.gather(*(replicas.generate(entry) for entry in requests))
        for _ in range(6):
            await asyncio.sleep(0.02)
            dice.choice(factories).built[-1].dead = "killed"
        return await running

    assert [completion.tokens for completion in run(scenario())] == expected(requests)
    replicas.close()


def test_a_rebuilt_engine_that_cannot_join_is_closed():
    """Otherwise every retry would leak an engine with its processes and memory."""
    factory = Factory()
    replicas = Replicas([factory, MemoryEngine()], names=["a", "b"])
    replicas.pause()
    original, factory.die = factory.built[0], "broken pipe"
    original.dead = "killed"
    replicas.abort()  # finds the death
    deadline = time.monotonic() + WAIT_S
    while "its restart failed: broken pipe" not in replicas.reasons.get("a", ""):
        assert time.monotonic() < deadline, replicas.reasons
        time.sleep(0.01)
    assert factory.built[1].closed
    factory.die = None
    replicas.wait_until_running(WAIT_S)
    while "a" in replicas.reasons:
        assert time.monotonic() < deadline, replicas.reasons
        time.sleep(0.05)
    assert [engine.closed for engine in factory.built] == [True] * (len(factory.built) - 1) + [False]
    replicas.close()
    assert factory.built[-1].closed


def test_an_engine_that_starts_after_the_timeout_is_closed():
    release, late = threading.Event(), MemoryEngine()

    def slow() -> MemoryEngine:
        release.wait(WAIT_S)
        return late

    with pytest.raises(EngineError, match=r"b: it did not start within 0\.2 s"):
        Replicas([MemoryEngine, slow], names=["a", "b"], start_together=True, start_timeout_s=0.2)
    release.set()
    deadline = time.monotonic() + WAIT_S
    while not late.closed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
