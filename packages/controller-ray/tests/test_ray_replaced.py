"""Rollout processes that die while they are asked, and what those in their places know."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.controller.placement import ResourcePool
from rlcore.engines.settings import WeightSyncSettings
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import RlcoreWarning, WorkerDied
from rlcore_ray import RayExecutor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*it is replaced:rlcore.errors.RlcoreWarning"),
]

WAIT_S = 120.0
POOLS = {"train": ResourcePool(cpus_per_process=0.5), "gen": ResourcePool(processes=2, cpus_per_process=0.5)}
SYNC = WeightSyncSettings(bucket_mb=1)


class Trainer:
    """Weights that say how often they were trained."""

    device = torch.device("cpu")

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.trained = 0

    def export_weights(self, bucket_bytes: int) -> Iterator[WeightBucket]:
        yield WeightBucket((("trained", torch.tensor([float(self.trained)])),))

    def export_adapters(self, bucket_bytes: int) -> Iterator[WeightBucket]:
        yield WeightBucket((("trained", torch.tensor([-float(self.trained)])),))


class Generator:
    """A rollout engine that answers with its process, version and weights."""

    takes_adapters = False

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.version, self.weights = 0, 0.0

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None:
        for bucket in buckets:
            self.weights = float(dict(bucket.tensors)["trained"])
        self.version = version


Answer = tuple[int, int, float]


def answer(engine: Generator) -> Answer:
    return os.getpid(), engine.version, engine.weights


async def answer_later(engine: Generator, sign: Path) -> Answer:
    """Say by a file of this process's that it has begun, and answer when ``sign`` is there."""
    (sign.parent / f"begun-{os.getpid()}").touch()
    deadline = time.monotonic() + WAIT_S
    while not sign.exists() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return answer(engine)


def answer_each(engine: Generator, items: Sequence[int], sign: Path) -> Iterator[tuple[list[int], tuple[int, Answer]]]:
    (sign.parent / f"begun-{os.getpid()}").touch()
    deadline = time.monotonic() + WAIT_S
    while not sign.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for place, item in enumerate(items):
        yield [place], (item, answer(engine))


def answer_or_die(engine: Generator, dying: int) -> Answer:
    """Fail in the process ``dying`` as an engine does whose own processes are gone."""
    if os.getpid() == dying:
        raise WorkerDied("the engine's process died")
    return answer(engine)


def train(engine: Trainer, steps: int) -> None:
    engine.trained = steps


def take_adapters(engine: Generator, takes: bool) -> None:
    engine.takes_adapters = takes


@pytest.fixture(scope="module")
def run(forked_workers: None) -> Iterator[tuple[RayExecutor, Any, Any]]:
    executor = RayExecutor(POOLS, {"actor": "train", "rollout": "gen", "compute": "gen"}, call_timeout_s=WAIT_S)
    try:
        actor, rollout = executor.build("actor", Trainer, Trainer), executor.build("rollout", Generator, Generator)
        executor.barrier()
        yield executor, actor, rollout
    finally:
        executor.close()


@pytest.fixture(autouse=True)
def fresh(run: tuple[RayExecutor, Any, Any]) -> Iterator[None]:
    executor = run[0]
    executor.on_worker_replaced(None)
    executor._workers._replaced.clear()
    step(run, 5)
    yield
    executor.on_worker_replaced(None)


def step(run: tuple[RayExecutor, Any, Any], number: int) -> None:
    executor, actor, rollout = run
    executor.apply(actor, train, number)
    executor.sync_weights(actor, rollout, number, SYNC)


def kill(run: tuple[RayExecutor, Any, Any], folder: Path, processes: Sequence[int]) -> None:
    """Kill ``processes`` once they are at work."""
    wait_until(lambda: all((folder / f"begun-{pid}").exists() for pid in processes))
    for pid in processes:
        os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(run: tuple[RayExecutor, Any, Any]) -> list[int]:
    executor, _, rollout = run
    return [pid for pid, _, _ in executor.apply(rollout, answer)]


def test_a_rollout_gets_the_adapters_that_it_takes(run: tuple[RayExecutor, Any, Any]) -> None:
    executor, _, rollout = run
    for takes, expected in ((True, -6.0), (False, 6.0)):
        executor.apply(rollout, take_adapters, takes)
        executor._links.clear()  # it says so when a connection is opened
        step(run, 6)
        assert [weights for _, _, weights in executor.apply(rollout, answer)] == [expected, expected]


def test_a_replaced_process_is_asked_for_nothing_before_it_has_the_weights(
    run: tuple[RayExecutor, Any, Any], tmp_path: Path
) -> None:
    executor, _, rollout = run
    executor.on_worker_replaced(lambda: None)
    first, second = pids(run)
    sign = tmp_path / "go"
    under_way = [executor.submit(rollout, answer_later, sign) for _ in range(4)]
    kill(run, tmp_path, [first])
    wait_until(lambda: not executor.wait_any(under_way, 0.05) and executor.has_stale_workers(rollout))
    sign.touch()
    assert [one.result() for one in under_way] == [(second, 5, 5.0)] * 4, "nothing is lost or computed twice"
    assert [executor.submit(rollout, answer).result() for _ in range(4)] == [(second, 5, 5.0)] * 4

    step(run, 6)
    assert not executor.has_stale_workers(rollout)
    answers = [one.result() for one in [executor.submit(rollout, answer_later, sign) for _ in range(4)]]
    assert {(version, weights) for _, version, weights in answers} == {(6, 6.0)}
    assert len({pid for pid, _, _ in answers}) == 2
    assert first not in pids(run)


def test_the_thread_that_notices_a_death_may_sync_weights(run: tuple[RayExecutor, Any, Any], tmp_path: Path) -> None:
    executor, actor, rollout = run
    noticed = []

    def catch_up() -> None:
        noticed.append(threading.current_thread())
        executor.sync_weights(actor, rollout, 5, SYNC)

    executor.on_worker_replaced(catch_up)
    both, sign = pids(run), tmp_path / "go"
    under_way = [executor.submit(rollout, answer_later, sign) for _ in range(4)]
    kill(run, tmp_path, both)
    wait_until(lambda: not executor.wait_any(under_way, 0.05) and not set(pids_of(executor)) & set(both))
    sign.touch()
    answers = [one.result() for one in under_way]
    assert {(version, weights) for _, version, weights in answers} == {(5, 5.0)}
    assert set(noticed) == {threading.current_thread()}
    assert not executor.has_stale_workers(rollout)


def pids_of(executor: RayExecutor) -> list[int]:
    return [location.pid for location in executor.pools["gen"].locations]


def test_calls_wait_while_no_process_has_the_weights(run: tuple[RayExecutor, Any, Any], tmp_path: Path) -> None:
    executor, _, rollout = run
    executor.on_worker_replaced(lambda: None)
    both, sign = pids(run), tmp_path / "go"
    sign.touch()
    under_way = [executor.submit(rollout, answer_later, tmp_path / "never") for _ in range(2)]
    kill(run, tmp_path, both)
    wait_until(lambda: not executor.wait_any(under_way, 0.05) and not set(pids_of(executor)) & set(both))
    asked = executor.submit(rollout, answer)
    assert executor.wait_any([asked], 0.5) == []
    assert not asked.done
    assert "answer on gen" in str(asked)
    (tmp_path / "never").touch()
    step(run, 7)
    assert asked.result()[1:] == (7, 7.0)
    assert [one.result()[1:] for one in under_way] == [(7, 7.0)] * 2


def test_a_stream_is_answered_with_the_weights_alone(run: tuple[RayExecutor, Any, Any], tmp_path: Path) -> None:
    executor, actor, rollout = run
    executor.on_worker_replaced(lambda: executor.sync_weights(actor, rollout, 5, SYNC))
    both, sign = pids(run), tmp_path / "go"
    killer = threading.Thread(target=lambda: (kill(run, tmp_path, both), sign.touch()))
    killer.start()
    answers = [result for _, result in executor.stream(rollout, answer_each, list(range(6)), sign)]
    killer.join()
    assert sorted(item for item, _ in answers) == list(range(6))
    assert {found[1:] for _, found in answers} == {(5, 5.0)}
    assert not {found[0] for _, found in answers} & set(both)


def test_waiting_gives_what_is_done(run: tuple[RayExecutor, Any, Any], tmp_path: Path) -> None:
    executor, _, rollout = run
    slow, fast = executor.submit(rollout, answer_later, tmp_path / "go"), executor.submit(rollout, answer)
    assert executor.wait_any([slow, fast], WAIT_S) == [fast]
    assert executor.wait_any([slow], 0.05) == []
    (tmp_path / "go").touch()
    assert executor.wait_any([slow], WAIT_S) == [slow]
    assert executor.wait_any([slow, fast], WAIT_S) == [slow, fast]


def test_a_death_is_reported_once(run: tuple[RayExecutor, Any, Any], tmp_path: Path) -> None:
    executor, _, rollout = run
    under_way = [executor.submit(rollout, answer_later, tmp_path / "go") for _ in range(4)]
    kill(run, tmp_path, pids(run)[:1])
    (tmp_path / "go").touch()
    with pytest.warns(RlcoreWarning, match=r"gen\[0\].* is gone .*; it is replaced") as caught:
        assert len([one.result() for one in under_way]) == 4
    assert len(caught) == 1


def test_a_process_whose_engine_died_is_replaced(run: tuple[RayExecutor, Any, Any]) -> None:
    executor, actor, rollout = run
    executor.on_worker_replaced(lambda: executor.sync_weights(actor, rollout, 5, SYNC))
    both = pids(run)
    answers = [one.result() for one in [executor.submit(rollout, answer_or_die, both[0]) for _ in range(4)]]
    assert {found[1:] for found in answers} == {(5, 5.0)}
    assert both[0] not in {found[0] for found in answers}
    assert both[0] not in pids(run)
