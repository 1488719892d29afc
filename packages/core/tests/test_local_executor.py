"""The local executor: alone, and in two processes that run the same program over gloo."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlcore import Batch, Jagged
from rlcore.controller import Dispatch, LocalExecutor, dispatch
from rlcore.engines import GenerationRequest, SamplingParams
from rlcore.errors import CheckpointError, EngineError, WorkerError
from rlcore.metrics import Metrics
from rlcore_kit.testing.processes import RankPool

WORLD = 2


class Engine:
    """Notes what it was called with; the interface and one implementation in one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.dp_rank, self.dp_size = rank, size
        self.parts: list[Any] = []

    @dispatch(Dispatch.SHARD)
    def double(self, batch: Batch, by: int = 2) -> Batch:
        self.parts.append(batch)
        total = torch.tensor(len(batch))
        if self.dp_size > 1:  # a collective that all ranks must reach, samples or not
            dist.all_reduce(total)
        return batch.select("tokens").with_columns(doubled=batch["index"] * by, seen=total.repeat(len(batch)))

    @dispatch(Dispatch.SHARD)
    def generate_batch(self, requests: Sequence[GenerationRequest]) -> list[list[int]]:
        self.parts.append(requests)
        return [[*request.prompt, self.dp_rank] for request in requests]

    @dispatch(Dispatch.SHARD)
    def train(self, batch: Batch) -> Metrics:
        metrics = Metrics()
        metrics.mean("index", batch["index"].float().mean(), weight=len(batch))
        metrics.sum("tokens", batch.total_tokens)
        metrics.max("lr", torch.tensor(0.5))
        return metrics

    @dispatch(Dispatch.BROADCAST)
    def configure(self, value: int) -> tuple[int, int]:
        self.parts.append(value)
        return value, self.dp_rank

    @dispatch(Dispatch.BROADCAST)
    def describe(self) -> str:
        self.parts.append("described")
        return f"engine of rank {self.dp_rank}"

    @dispatch(Dispatch.STREAM)
    def stream(self, n: int) -> Iterator[int]:
        yield from range(n)

    @dispatch(Dispatch.SHARD)
    def fail(self, batch: Batch, how: str, rank: int, wait: float = 0.0) -> Batch:
        if self.dp_rank == rank:
            if how == "wrong size":
                return batch.take([])
            if how == "unpicklable":
                return [lambda: None] * len(batch)  # type: ignore[return-value]
            raise {"value": ValueError, "engine": EngineError}[how]("out of luck")
        time.sleep(wait)
        return batch

    @dispatch(Dispatch.SHARD)
    def fail_inside_a_collective(self, batch: Batch, rank: int) -> Batch:
        if self.dp_rank == rank:
            raise ValueError("out of luck")
        dist.all_reduce(torch.zeros(1))
        return batch

    @dispatch(Dispatch.BROADCAST)
    def load(self, path: Path) -> None:
        raise CheckpointError(f"{path}: no such checkpoint")


def batch_of(lengths: Sequence[int]) -> Batch:
    tokens = Jagged.from_list([[i] * n for i, n in enumerate(lengths)], dtype=torch.int64)
    return Batch({"tokens": tokens, "index": torch.arange(len(lengths)), "text": [str(i) for i in range(len(lengths))]})


# --- one process ---------------------------------------------------------------------------------------------------


def test_alone_a_group_is_its_engine() -> None:
    engine = Engine()
    group = LocalExecutor().workers(Engine, engine)
    batch = batch_of([1, 2])
    assert group.double(batch, by=3)["doubled"].tolist() == [0, 3]
    assert engine.parts[0] is batch
    assert group.configure(4) == (4, 0)
    assert group.describe() == "engine of rank 0"
    assert list(group.stream(3)) == [0, 1, 2]
    assert group.dp_size == 1
    with pytest.raises(CheckpointError, match=r"^x: no such checkpoint$"):
        group.load(Path("x"))
    with pytest.raises(AttributeError, match="nonsense"):
        group.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_one_process_waits_for_no_other() -> None:
    executor = LocalExecutor()
    assert executor.is_main
    executor.barrier()
    value = object()
    assert executor.on_main(lambda: value) is value
    assert executor.all_gather(value) == [value]


# --- two processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(WORLD)
    yield pool
    pool.close()


def start() -> int:
    """Join the process group of the pool's processes; this process's rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank()


LENGTHS = [5, 1, 4, 2, 3, 3, 9]


def healthy_program() -> dict[str, Any]:
    rank = start()
    executor = LocalExecutor(timeout_s=30)
    engine = Engine(rank, WORLD)
    group = executor.workers(Engine, engine, role="actor")
    batch = batch_of(LENGTHS)
    requests = [GenerationRequest([i], SamplingParams(max_tokens=1), group=i // 3) for i in range(9)]
    result: dict[str, Any] = {
        "double": group.double(batch),
        "by name": group.double(by=3, batch=batch)["doubled"].tolist(),
        "few": group.double(batch.slice(0, 1)),
        "none": group.double(batch.slice(0, 0)),
        "generated": group.generate_batch(requests),
        "trained": group.train(batch).to_dict(),
        "trained on one": group.train(batch.slice(2, 3)).to_dict(),
        "configured": group.configure(7),
        "described": group.describe(),
        "streamed": list(group.stream(2)),
        "is_main": executor.is_main,
        "on_main": executor.on_main(lambda: f"by {rank}"),
        "all_gather": executor.all_gather(rank * 10),
        "dp_rank": group.dp_rank,
    }
    executor.barrier()
    second = LocalExecutor()  # a second executor, e.g. of a library, does not disturb the first
    second.barrier()
    executor.barrier()
    result["parts"] = engine.parts
    return result


@pytest.fixture(scope="module")
def healthy(pool: RankPool) -> list[dict[str, Any]]:
    return pool.run(healthy_program)


def closing_program() -> tuple[list[int], int]:
    rank = start()
    executor = LocalExecutor()
    counts = [threads()]
    for _ in range(2):
        executor.barrier()
        counts.append(threads())
        executor.close()
        counts.append(threads())
    executor.close()
    return counts, LocalExecutor().on_main(lambda: rank)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_closed_executor_leaves_no_thread_behind_and_can_be_used_again(pool: RankPool) -> None:
    """Such a thread may hold tensors of the last call, which the interpreter's exit does not survive."""
    for counts, first in pool.run(closing_program):
        before, open_, closed, *again = counts
        assert before == closed < open_
        assert again == [open_, closed]
        assert first == 0


def test_shard_gives_every_rank_all_results_in_order(healthy: list[dict[str, Any]]) -> None:
    batch = batch_of(LENGTHS)
    for answer in healthy:
        expected = batch.select("tokens").with_columns(doubled=batch["index"] * 2, seen=torch.full((7,), 7))
        assert answer["double"].equals(expected)
        assert answer["by name"] == [i * 3 for i in range(7)]


def test_shard_divides_by_tokens(healthy: list[dict[str, Any]]) -> None:
    tokens = [answer["parts"][0].total_tokens for answer in healthy]
    assert sum(tokens) == sum(LENGTHS)
    assert abs(tokens[0] - tokens[1]) <= 1


def test_ranks_without_samples_take_part(healthy: list[dict[str, Any]]) -> None:
    """`Engine.double` holds a collective: it would hang if a rank were left out."""
    for answer in healthy:
        assert answer["few"]["seen"].tolist() == [1]
        assert answer["none"]["seen"].tolist() == []
    assert sorted(len(answer["parts"][2]) for answer in healthy) == [0, 1]


def test_groups_of_requests_stay_on_one_rank(healthy: list[dict[str, Any]]) -> None:
    for answer in healthy:
        assert [tokens[0] for tokens in answer["generated"]] == list(range(9))
        makers = [tokens[1] for tokens in answer["generated"]]
        assert makers == [makers[0]] * 3 + [makers[3]] * 3 + [makers[6]] * 3
        assert set(makers) == {0, 1}


def test_metrics_are_those_of_all_samples(healthy: list[dict[str, Any]]) -> None:
    for answer in healthy:
        assert answer["trained"] == {"index": pytest.approx(3.0), "tokens": 27.0, "lr": 0.5}
        # the mean over no samples is NaN on the other rank, and does not count
        assert answer["trained on one"] == {"index": 2.0, "tokens": 4.0, "lr": 0.5}


def test_rank_zero_answers(healthy: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(healthy):
        assert answer["configured"] == (7, 0)
        assert 7 in answer["parts"]  # both ranks were called
        assert answer["described"] == "engine of rank 0"
        assert "described" in answer["parts"]
        assert answer["streamed"] == [0, 1]
        assert answer["on_main"] == "by 0"
        assert answer["all_gather"] == [0, 10]
        assert (answer["is_main"], answer["dp_rank"]) == (rank == 0, rank)


def attempt(call: Callable[[], Any]) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


def failing_program() -> dict[str, Any]:
    rank = start()
    executor = LocalExecutor(timeout_s=30, grace_s=20)
    group = executor.workers(Engine, Engine(rank, WORLD), role="actor")
    batch = batch_of(LENGTHS)

    def only_on_main() -> None:
        raise ValueError(f"only on {rank}")

    result: dict[str, Any] = {
        "value": attempt(lambda: group.fail(batch, "value", rank=1)),
        "engine": attempt(lambda: group.fail(batch, "engine", rank=0)),
        "unpicklable": attempt(lambda: group.fail(batch, "unpicklable", rank=1)),
        "wrong size": attempt(lambda: group.fail(batch, "wrong size", rank=1)),
        "everywhere": attempt(lambda: group.load(Path("x"))),
        "on_main": attempt(lambda: executor.on_main(only_on_main, "validation")),
        "out of step": attempt(lambda: group.configure(1) if rank else group.describe()),
        "short": attempt(lambda: group.double(batch.slice(0, 1 + rank))),
    }
    result["afterwards"] = group.double(batch)["seen"].tolist()  # a caller that catches the error can go on
    return result


@pytest.fixture(scope="module")
def failing(pool: RankPool) -> list[dict[str, Any]]:
    return pool.run(failing_program)


def test_a_failure_is_raised_on_all_ranks(failing: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(failing):
        kind, message, _ = answer["value"]
        assert kind == "WorkerError"
        assert message.startswith("actor.fail with 7 samples failed on rank 1: ValueError: out of luck")
        # the rank that failed has the traceback in its chain; the other gets it in the message, once
        assert message.count("Traceback (most recent call last)") == (rank == 0)
        assert ('raise {"value": ValueError' in message) == (rank == 0)


def test_our_own_errors_keep_their_class_and_stay_short(failing: list[dict[str, Any]]) -> None:
    for answer in failing:
        assert answer["engine"][:2] == ("EngineError", "actor.fail with 7 samples failed on rank 0: out of luck")
        kind, message, _ = answer["everywhere"]
        assert kind == "CheckpointError"
        assert message.endswith("x: no such checkpoint")


def test_bad_results_are_failures_too(failing: list[dict[str, Any]]) -> None:
    for answer in failing:
        kind, message, _ = answer["unpicklable"]
        assert kind == "WorkerError"
        assert "failed on rank 1" in message
        assert "pickle" in message
        assert answer["wrong size"][0] == "ValueError"
        assert "data-parallel rank 1 returned 0 entries" in answer["wrong size"][1]


def test_work_for_the_main_rank_fails_everywhere(failing: list[dict[str, Any]]) -> None:
    for answer in failing:
        assert answer["on_main"][0] == "WorkerError"
        assert answer["on_main"][1].startswith("validation failed on rank 0: ValueError: only on 0")


def test_ranks_out_of_step_raise(failing: list[dict[str, Any]]) -> None:
    for answer in failing:
        assert answer["out of step"][0] == "WorkerError"
        assert "out of step: rank 0 in actor.describe, rank 1 in actor.configure" in answer["out of step"][1]
        assert "rank 0 in actor.double with 1 samples, rank 1 in actor.double with 2" in answer["short"][1]


def test_no_rank_waits_and_all_can_go_on(failing: list[dict[str, Any]]) -> None:
    for answer in failing:
        assert all(value[2] < 10 for name, value in answer.items() if name != "afterwards")
        assert answer["afterwards"] == [7] * 7


def crash(folder: Path, method: str, failing: int) -> None:
    """Call ``method`` and die of what it raises, as a trainer does; the last words are in ``folder``."""
    rank = start()
    group = LocalExecutor(timeout_s=50, grace_s=0.5).workers(Engine, Engine(rank, WORLD), role="actor")
    try:
        if method == "busy":
            group.fail(batch_of(LENGTHS), "value", failing, wait=2.0)
        else:
            group.fail_inside_a_collective(batch_of(LENGTHS), failing)
    except Exception:
        (folder / str(rank)).write_text(traceback.format_exc())
        os._exit(1)


@pytest.mark.parametrize(("method", "failing"), [("busy", 1), ("collective", 1), ("collective", 0)])
def test_a_rank_that_waits_for_a_failed_one_is_released(method: str, failing: int, tmp_path: Path) -> None:
    """The other rank is busy for longer than the grace period, or waits for the failed one inside the engine."""
    pool = RankPool(WORLD)
    with pytest.raises(AssertionError, match="rank 0 failed:\nthe process died\nrank 1 failed:\nthe process died"):
        pool.run(crash, tmp_path, method, failing, timeout=30)
    failed, other = ((tmp_path / str(rank)).read_text() for rank in (failing, 1 - failing))
    assert f"failed on rank {failing}: ValueError: out of luck" in failed
    assert re.search(rf"no answer from rank {1 - failing} within .* s; these ranks stop when this process ends", failed)
    if failing == 0:  # rank 0 held the store: what it died of cannot be asked any more
        assert "lost the connection to rank 0" in other
    else:
        assert "failed on rank 1: ValueError: out of luck" in other


def wait_for_rank_one() -> tuple[str, str, float] | None:
    rank = start()
    executor = LocalExecutor(timeout_s=0.5)
    executor.barrier()
    if rank == 1:
        time.sleep(1.5)
        return None
    return attempt(lambda: executor.barrier("save"))


def test_a_rank_that_does_not_come_is_named(pool: RankPool) -> None:
    kind, message, seconds = pool.run(wait_for_rank_one)[0]
    assert kind == WorkerError.__name__
    assert message == "save: no answer from rank 1 within 0.5 s"
    assert seconds < 1.5
