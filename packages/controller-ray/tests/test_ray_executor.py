"""One contract for both executors, then what only worker processes can do: overlap, lazy results, their errors."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from rlcore import Batch, Jagged
from rlcore.controller import Dispatch, Event, Executor, LocalExecutor, dispatch
from rlcore.controller.placement import ResourcePool
from rlcore.errors import BatchError, CheckpointError, WorkerError
from rlcore.metrics import Metrics
from rlcore_ray import RayExecutor, RemoteBatch, cluster

MEETING_S = 60.0
RANKS = 2
POOLS = {"train": ResourcePool(processes=RANKS), "gen": ResourcePool(processes=2, cpus_per_process=0.5)}
PLACEMENT = {"actor": "train", "rollout": "gen", "reward": "gen", "compute": "gen"}


class Engine:
    """The interface and one implementation in one."""

    motto: str

    def __init__(self, role: str, engines: Mapping[str, Any]) -> None:
        self.role = role
        joined = dist.is_initialized()
        self.dp_rank, self.dp_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.notes: list[Any] = []
        self.motto = f"hello from {role} {self.dp_rank}"

    @property
    def pid(self) -> int:
        return os.getpid()

    @dispatch(Dispatch.SHARD)
    def double(self, batch: Batch, by: int = 2) -> Batch:
        total = torch.tensor(len(batch))
        if self.dp_size > 1:  # a collective that all ranks must reach, samples or not
            dist.all_reduce(total)
        return batch.select("tokens", "text").with_columns(doubled=batch["index"] * by, seen=total.repeat(len(batch)))

    @dispatch(Dispatch.SHARD, lazy=True)
    def forward(self, batch: Batch, by: float = 0.5) -> Batch:
        self.notes.append("forward")
        return Batch({"logprobs": batch.jagged(batch.flat("tokens") * by)})

    @dispatch(Dispatch.SHARD, lazy=True)
    def fail(self, batch: Batch, rank: int, ours: bool = False) -> Batch:
        if self.dp_rank == rank:
            raise CheckpointError("no luck") if ours else ValueError("no luck")
        return Batch({"logprobs": batch.jagged(batch.flat("tokens") * 1.0)})

    @dispatch(Dispatch.SHARD)
    def generate(self, requests: Sequence[int]) -> list[str]:
        return [f"{request}!" for request in requests]

    @dispatch(Dispatch.SHARD)
    def train(self, batch: Batch, scale: float = 1.0) -> Metrics:
        self.notes.append("train")
        metrics = Metrics()
        metrics.mean("index", scale * batch["index"].float().mean(), weight=len(batch))
        metrics.sum("tokens", batch.total_tokens)
        return metrics

    @dispatch(Dispatch.SHARD)
    def nothing(self, batch: Batch) -> None:
        return

    @dispatch(Dispatch.BROADCAST)
    def configure(self, value: int) -> tuple[int, int]:
        self.notes.append(value)
        return value, self.dp_rank

    @dispatch(Dispatch.BROADCAST)
    def describe(self) -> str:
        self.notes.append("described")
        return f"{self.role} {self.dp_rank}"

    @dispatch(Dispatch.BROADCAST, lazy=True)
    def note(self, value: int) -> None:
        self.notes.append(value)

    @dispatch(Dispatch.BROADCAST)
    def load(self, path: str) -> None:
        raise CheckpointError(f"{path}: no such checkpoint")

    @dispatch(Dispatch.SHARD, lazy=True)
    def meet(self, batch: Batch, own: Path, other: Path) -> Batch:
        meet(self, own, other)
        return Batch({"met": batch.jagged(batch.flat("tokens"))})

    async def answer(self, question: str) -> str:
        return question


def meet(engine: Engine, own: Path, other: Path) -> float:
    """Create ``own`` and wait for ``other``; return the time when both exist."""
    own.touch()
    deadline = time.monotonic() + MEETING_S
    while not other.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{other.name} was not created")
        time.sleep(0.01)
    return time.time()


def batch_of(lengths: Sequence[int]) -> Batch:
    tokens = Jagged.from_list([[i] * n for i, n in enumerate(lengths)], dtype=torch.int64)
    return Batch(
        {"tokens": tokens, "index": torch.arange(len(lengths)), "text": [f"sample {i}" for i in range(len(lengths))]}
    )


def read(batch: Any) -> Batch:
    """What the caller may look into."""
    return batch.fetch() if isinstance(batch, RemoteBatch) else batch


LENGTHS = (5, 1, 4, 2, 3, 3, 9)


@pytest.fixture(scope="module")
def workers(forked_workers: None) -> Iterator[RayExecutor]:
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import the modules of tests
    before = set(psutil.Process().children(recursive=True))
    executor = RayExecutor(POOLS, PLACEMENT, call_timeout_s=120)
    yield executor
    executor.close()
    ray.cloudpickle.unregister_pickle_by_value(module)
    _, left = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=20)
    assert left == []


@pytest.fixture(scope="module")
def ray_groups(workers: RayExecutor) -> tuple[Any, Any]:
    groups = tuple(workers.build(role, Engine, partial(Engine, role)) for role in ("actor", "rollout"))
    workers.barrier()
    return groups  # type: ignore[return-value]


@pytest.fixture(params=["local", "ray"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def executor(kind: str, request: pytest.FixtureRequest) -> Executor:
    return LocalExecutor() if kind == "local" else request.getfixturevalue("workers")


@pytest.fixture
def groups(kind: str, executor: Executor, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    if kind == "ray":
        return request.getfixturevalue("ray_groups")  # type: ignore[no-any-return]
    return tuple(executor.build(role, Engine, partial(Engine, role)) for role in ("actor", "rollout"))  # type: ignore[return-value]


# --- the contract --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1], ()])
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_shard_gives_all_results_in_order(
    executor: Executor, groups: tuple[Any, Any], lengths: Sequence[int], held: bool, which: int
) -> None:
    """Also of fewer samples than ranks. ``held``: by the workers, as batches are in a recipe."""
    batch = batch_of(lengths)
    given = executor.compute(batch_of, lengths) if held else batch
    found = groups[which].double(given, by=3)
    assert type(found) is type(given)
    assert found["doubled"].tolist() == [3 * i for i in range(len(lengths))]
    want = batch.select("tokens", "text").with_columns(doubled=batch["index"] * 3)
    if lengths:
        assert read(found).drop("seen").equals(want)
        assert which == 1 or found["seen"].tolist() == [len(lengths)] * len(lengths)
        assert groups[which].double(batch=given)["doubled"].tolist() == [2 * i for i in range(len(lengths))]
    logprobs = groups[which].forward(given)["logprobs"]
    joined = read(given.with_columns(logprobs=logprobs))
    assert joined.equals(batch.with_columns(logprobs=batch.jagged(batch.flat("tokens") * 0.5)))
    assert groups[which].nothing(given) is None


def test_shard_joins_lists_and_metrics(executor: Executor, groups: tuple[Any, Any]) -> None:
    for group in groups:
        assert group.generate(list(range(7))) == [f"{i}!" for i in range(7)]
        assert group.generate([4]) == ["4!"]
        assert group.generate([]) == []
    held = executor.compute(batch_of, LENGTHS)
    assert groups[0].train(held, scale=2.0).to_dict() == {"index": pytest.approx(6.0), "tokens": 27.0}
    assert groups[0].train(batch_of(LENGTHS)).to_dict() == {"index": pytest.approx(3.0), "tokens": 27.0}
    assert groups[0].train(held.slice(2, 3)).to_dict() == {"index": 2.0, "tokens": 4.0}


def test_broadcast_calls_all_ranks_and_returns_the_first_result(executor: Executor, groups: tuple[Any, Any]) -> None:
    actor, _ = groups
    executor.apply(actor, lambda engine: engine.notes.clear())
    assert actor.configure(7) == (7, 0)
    assert actor.describe() == "actor 0"
    assert all(notes == [7, "described"] for notes in executor.apply(actor, lambda engine: engine.notes))


def test_attributes(groups: tuple[Any, Any]) -> None:
    actor, rollout = groups
    assert actor.motto == "hello from actor 0"
    assert rollout.motto.startswith("hello from rollout")
    assert isinstance(actor.pid, int)
    with pytest.raises(AttributeError, match="nonsense"):
        actor.nonsense  # noqa: B018
    assert not hasattr(actor, "nonsense")


def added(engine: Engine, *values: Any) -> tuple[str, list[Any], int]:
    return (
        engine.role,
        [read(value)["index"].tolist() if hasattr(value, "names") else value for value in values],
        engine.dp_rank,
    )


def halves(engine: Engine, batch: Batch) -> tuple[int, list[Batch]]:
    assert isinstance(batch, Batch)
    return engine.dp_rank, [batch.slice(0, 2), batch.slice(2, len(batch))]


def test_apply_runs_everywhere(executor: Executor, groups: tuple[Any, Any]) -> None:
    held = executor.compute(batch_of, LENGTHS)
    found = executor.apply(groups[0], added, held, "x")
    assert found == [("actor", [list(range(7)), "x"], rank) for rank in range(len(found))]
    assert len(found) == groups[0].dp_size
    for rank, (own, (left, right)) in enumerate(executor.apply(groups[0], halves, held)):
        assert own == rank
        assert read(type(left).concat([right, left])).equals(batch_of(LENGTHS).take([2, 3, 4, 5, 6, 0, 1]))


async def asked(engine: Engine, batch: Batch) -> Batch:
    await asyncio.sleep(0)
    assert await engine.answer("well?") == "well?"
    return batch.select("text", "index")


def explained(engine: Engine, prefix: str, suffix: str) -> str:
    return f"{prefix} {engine.role} {suffix}"


def test_one_answers_for_all(executor: Executor, groups: tuple[Any, Any]) -> None:
    """Plain and coroutine functions, on engines that train and on those that answer requests."""
    held = executor.compute(batch_of, LENGTHS)
    for group, role in zip(groups, ("actor", "rollout")):
        pending = executor.submit(group, partial(explained, suffix="!"), "dear")
        assert pending.result() == f"dear {role} !"
        assert pending.done
        assert pending.result() == f"dear {role} !"
        several = [executor.submit(group, asked, part) for part in held.split(2)]
        parts = [answer.result() for answer in several]
        assert read(type(parts[0]).concat(parts)).equals(batch_of(LENGTHS).select("text", "index"))


def answered(engine: Engine, items: Sequence[int], batch: Batch) -> Iterator[tuple[list[int], Batch]]:
    """The last first, two at a time."""
    for end in range(len(items), 0, -2):
        places = list(range(max(end - 2, 0), end))
        yield places, batch.take([items[place] for place in places])


def test_stream_answers_every_item_once(executor: Executor, groups: tuple[Any, Any]) -> None:
    held = executor.compute(batch_of, LENGTHS)
    items = [6, 0, 3, 3, 5]
    found: dict[int, int] = {}
    for places, part in executor.stream(groups[1], answered, items, held):
        assert len(places) == len(part)
        assert read(part).equals(batch_of(LENGTHS).take([items[place] for place in places]))
        assert not found.keys() & set(places)
        found |= dict(zip(places, part["index"].tolist()))
    assert found == dict(enumerate(items))
    assert list(executor.stream(groups[1], answered, [], held)) == []


def combined(batch: Batch, parts: list[Batch], nested: tuple[list[Batch], int]) -> tuple[Batch, dict[str, float]]:
    assert all(isinstance(part, Batch) for part in (batch, *parts, *nested[0]))
    return Batch.concat([*parts, *nested[0]]), {"tokens": float(batch.total_tokens), "more": float(nested[1])}


def test_compute_reads_batches_wherever_they_stand(executor: Executor) -> None:
    held = executor.compute(batch_of, LENGTHS)
    found, numbers = executor.compute(combined, held, held.split(3), ([held.slice(0, 1)], 4))
    assert numbers == {"tokens": 27.0, "more": 4.0}
    assert read(found).equals(batch_of(LENGTHS).take([*range(7), 0]))


def test_our_own_errors_keep_their_class(executor: Executor, groups: tuple[Any, Any]) -> None:
    with pytest.raises(CheckpointError, match="x: no such checkpoint"):
        groups[0].load("x")
    with pytest.raises(BatchError, match="no column 'nonsense'"):
        executor.compute(Batch.select, executor.compute(batch_of, LENGTHS), "nonsense")
    assert groups[0].configure(1) == (1, 0)


# --- worker processes ------------------------------------------------------------------------------------------------


def intersect(left: Event, right: Event) -> bool:
    return max(left.start, right.start) < min(left.end, right.end)


def test_engines_of_two_pools_are_in_different_processes(workers: RayExecutor, ray_groups: tuple[Any, Any]) -> None:
    actor, rollout = ray_groups
    pids = workers.apply(actor, lambda engine: engine.pid) + workers.apply(rollout, lambda engine: engine.pid)
    assert len(set(pids)) == 4
    assert os.getpid() not in pids
    assert (actor.dp_size, rollout.dp_size) == (RANKS, 2)


def slow_engine(engines: Mapping[str, Any]) -> Engine:
    time.sleep(1)
    return Engine("reward", engines)


def test_calls_wait_until_the_engine_is_built(workers: RayExecutor) -> None:
    group = workers.build("reward", Engine, slow_engine)
    assert workers.submit(group, partial(explained, suffix="!"), "dear").result() == "dear reward !"


def test_pools_work_at_the_same_time(workers: RayExecutor, ray_groups: tuple[Any, Any], tmp_path: Path) -> None:
    """Each side waits until the other one is at work, so neither would end if they took turns."""
    held = workers.compute(batch_of, LENGTHS)
    a, b = tmp_path / "a", tmp_path / "b"
    workers.timeline()
    with workers.trace_label("first"):
        met = ray_groups[0].meet(held, a, b)
    with workers.trace_label("second"):
        assert workers.submit(ray_groups[1], meet, b, a).result() > 0
    assert read(held.with_columns(met=met["met"])).equals(
        batch_of(LENGTHS).with_columns(met=batch_of(LENGTHS)["tokens"])
    )
    workers.barrier()
    events = workers.timeline()
    first = [event for event in events if event.label == "first"]
    second = [event for event in events if event.label == "second"]
    assert {event.worker for event in first} == {"train[0]", "train[1]"}
    assert {event.name for event in first} == {"actor.meet"}
    assert [event.name for event in second] == ["rollout: meet"]
    assert second[0].worker.startswith("gen[")
    assert any(intersect(event, second[0]) for event in first)  # the rank that `second` met
    assert workers.timeline() == []


def test_a_consumer_waits_on_its_own_time(workers: RayExecutor, ray_groups: tuple[Any, Any], tmp_path: Path) -> None:
    """A lazy result is made before its consumer begins, by their own clocks."""
    held = workers.compute(batch_of, LENGTHS)
    workers.timeline()
    (tmp_path / "b").touch()
    met = ray_groups[0].meet(held, tmp_path / "a", tmp_path / "b")
    workers.compute(Batch.select, held.with_columns(met=met["met"]), "met")
    events = {event.name: event for event in workers.timeline()}
    assert events["actor.meet"].end <= events["select"].start


def test_calls_on_a_pool_keep_their_order(workers: RayExecutor, ray_groups: tuple[Any, Any]) -> None:
    actor, held = ray_groups[0], workers.compute(batch_of, LENGTHS)
    workers.apply(actor, lambda engine: engine.notes.clear())
    lazy = []
    for number in range(10):
        lazy.append(actor.forward(held)["logprobs"])
        if number % 3 == 0:
            actor.train(held.with_columns(logprobs=lazy[-1]))
        if number % 4 == 0:
            actor.note(number)
    want = [note for n in range(10) for note in ["forward", *["train"] * (n % 3 == 0), *[n] * (n % 4 == 0)]]
    assert workers.apply(actor, lambda engine: engine.notes) == [want] * RANKS


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("consumer", ["barrier", "group", "compute", "elsewhere"])
def test_a_lazy_failure_surfaces_once(
    workers: RayExecutor, ray_groups: tuple[Any, Any], rank: int, ours: bool, consumer: str
) -> None:
    """At the next wait, as what it was: with role and rank, not as what others made of it."""
    actor, held = ray_groups[0], workers.compute(batch_of, LENGTHS)
    failed = actor.fail(held, rank, ours)["logprobs"]
    consume = {
        "barrier": workers.barrier,
        "group": lambda: actor.train(held.with_columns(logprobs=failed)),
        "compute": lambda: workers.compute(Batch.select, held.with_columns(logprobs=failed), "logprobs"),
        "elsewhere": lambda: (workers.apply(ray_groups[1], lambda engine: None), workers.barrier()),
    }
    with pytest.raises(CheckpointError if ours else WorkerError) as raised:
        consume[consumer]()
    message = str(raised.value)
    assert message.startswith(f"actor.fail on train[{rank}] (process ")
    assert "no luck" in message
    assert message.count("Traceback (most recent call last)") == (0 if ours else 1)
    assert ours or 'raise CheckpointError("no luck") if ours else ValueError("no luck")' in message
    workers.barrier()
    workers.timeline()
    assert actor.configure(3) == (3, 0)


def test_calls_that_workers_do_not_support_are_refused_immediately(ray_groups: tuple[Any, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"actor.answer is asynchronous"):
        ray_groups[0].answer("well?")
    with pytest.raises(TypeError, match=r"double.. needs the argument 'batch'"):
        ray_groups[0].double(by=3)


def test_a_closed_executor_leaves_no_processes(workers: RayExecutor) -> None:
    """Another executor opened the cluster, so it stays."""
    pools = {"more": ResourcePool(processes=1, cpus_per_process=0)}
    executor = RayExecutor(pools, {"rollout": "more"}, call_timeout_s=120)
    group = executor.build("rollout", Engine, partial(Engine, "rollout"))
    process = psutil.Process(group.pid)
    executor.close()
    process.wait(timeout=30)
    assert cluster.ray.is_initialized()
    assert workers.compute(batch_of, [1])["index"].tolist() == [0]
