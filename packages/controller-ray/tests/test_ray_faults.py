"""Workers and controllers that fail, hang, die or are interrupted: who hears of it, what is said, and what stays."""

import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from click.testing import CliRunner

from rlcore import Batch, Jagged
from rlcore.cli.command_tree import _OWN, cli
from rlcore.controller import Dispatch, dispatch
from rlcore.controller.placement import ResourcePool
from rlcore.errors import EngineError, WorkerDied, WorkerError
from rlcore_ray import RayExecutor, cluster
from rlcore_ray.guard import Guard

WAIT_S = 120.0
PLACEMENT = {"actor": "train", "rollout": "gen", "compute": "gen"}
CPUS = 8


class Engine:
    def __init__(self, role: str, engines: Mapping[str, Any]) -> None:
        self.dp_rank, self.dp_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.value = 0
        print(f"{role} is built in process {os.getpid()}", flush=True)

    @dispatch(Dispatch.SHARD, lazy=True)
    def forward(self, batch: Batch, kill: int | None = None) -> Batch:
        if self.dp_rank == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.dp_size > 1:
            dist.all_reduce(torch.zeros(1))
        return Batch({"logprobs": batch.jagged(batch.flat("tokens") * 1.0)})

    @dispatch(Dispatch.BROADCAST)
    def fail_on(self, rank: int, error: type[Exception]) -> None:
        if self.dp_rank == rank:
            raise error("no luck")

    @dispatch(Dispatch.BROADCAST)
    def set(self, value: int) -> int:
        self.value = value
        return os.getpid()

    @dispatch(Dispatch.BROADCAST)
    def oversleep(self, rank: int) -> None:
        if self.dp_rank == rank:
            a_long_nap()

    @dispatch(Dispatch.BROADCAST)
    def close(self) -> None:
        return


def a_long_nap() -> None:
    time.sleep(10000)


def pid_and_value(engine: Engine) -> tuple[int, int]:
    return os.getpid(), engine.value


def kill_in_factory(folder: Path, engines: Mapping[str, Any]) -> Engine:
    """Die in the first replacement, and work in the next."""
    (folder / f"{os.getpid()}").touch()
    if len(list(folder.iterdir())) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return Engine("rollout", engines)


def exit_on_rank_1(engines: Mapping[str, Any]) -> Engine:
    if dist.get_rank() == 1:
        os._exit(3)
    return Engine("actor", engines)


def token_sum(batch: Batch) -> int:
    return int(batch.flat("tokens").sum())


def sum_of(batch: Batch, other: Batch) -> float:
    return float(batch.flat("logprobs").sum()) + float(other.flat("tokens").sum())


def texts() -> Batch:
    return Batch({"tokens": Jagged.from_list([[i] * (i + 1) for i in range(6)], dtype=torch.int64)})


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[None]:
    assert cluster.connect(None, {"all": ResourcePool(processes=CPUS)})
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import the modules of tests
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)
    cluster.disconnect()


@pytest.fixture
def executors(own_cluster: None, tmp_path: Path) -> Iterator[Callable[..., RayExecutor]]:
    made: list[RayExecutor] = []

    def make(train: int = 2, gen: int = 1, **settings: Any) -> RayExecutor:
        pools = {"train": ResourcePool(processes=train), "gen": ResourcePool(processes=gen)}
        made.append(RayExecutor(pools, PLACEMENT, logs=tmp_path / "logs", **settings))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def new_actor(engines: Mapping[str, Any]) -> Engine:
    return Engine("actor", engines)


def actor_of(executor: RayExecutor, factory: Callable[..., Engine] = new_actor) -> Any:
    group = executor.build("actor", Engine, factory)
    executor.barrier()
    return group


def wait_until(condition: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# --- what is said ---------------------------------------------------------------------------------------------------


def test_failures_hangs_and_deaths_in_one_pool(executors: Callable[..., RayExecutor], tmp_path: Path) -> None:
    executor = executors()
    actor = actor_of(executor)
    pids = [pid for pid, _ in executor.apply(actor, pid_and_value)]
    logs = [tmp_path / "logs" / f"train-{rank}.log" for rank in range(2)]
    titles = [f"train[{rank}] (process {pids[rank]} on 127.0.0.1, log {logs[rank]})" for rank in range(2)]
    assert all(wait_until(lambda r=r: f"actor is built in process {pids[r]}" in logs[r].read_text()) for r in range(2))

    with pytest.raises(WorkerError) as raised:
        actor.fail_on(1, ValueError)
    message = str(raised.value)
    assert message.startswith(f"actor.fail_on on {titles[1]}: ValueError: no luck\n")
    assert message.count("Traceback (most recent call last)") == 1
    assert "in fail_on" in message
    assert message.endswith("ValueError: no luck")

    with pytest.raises(EngineError) as ours:
        actor.fail_on(1, EngineError)
    assert str(ours.value) == f"actor.fail_on on {titles[1]}: no luck"

    remote = executor.compute(texts)
    assert executor.compute(token_sum, actor.forward(remote)["logprobs"] and remote) == 70
    lost = actor.forward(remote, kill=1)  # no call waits for it: the next call finds that its input will never exist
    with pytest.raises(WorkerDied) as died:
        executor.compute(sum_of, remote.with_columns(logprobs=lost["logprobs"]), remote)
    assert str(died.value).startswith(f"actor.forward on {titles[1]} is gone: ")
    assert "\n" not in str(died.value)


def test_a_call_that_hangs(executors: Callable[..., RayExecutor]) -> None:
    executor = executors(train=2)
    actor = actor_of(executor)
    executor._workers.waiter.timeout_s = 3.0
    with pytest.raises(WorkerError, match=r"no answer within 3 s from actor.oversleep on train\[1\]") as late:
        actor.oversleep(1)
    assert "train[0]" not in str(late.value)
    assert "in a_long_nap" in str(late.value)
    before = time.monotonic()
    actor.close()
    executor.close()
    assert time.monotonic() - before < WAIT_S / 2  # not the nap's length


def test_a_process_that_ends_while_its_engine_is_built(executors: Callable[..., RayExecutor]) -> None:
    with pytest.raises(WorkerDied, match=r"actor.build on train\[1\] \(process \d+ .*\) is gone"):
        actor_of(executors(), exit_on_rank_1)


# --- replicas -------------------------------------------------------------------------------------------------------


def test_replicas_are_replaced_in_broadcasts_and_again_while_they_are_built(
    executors: Callable[..., RayExecutor], tmp_path: Path
) -> None:
    executor = executors(train=1, gen=2)
    births = tmp_path / "births"
    births.mkdir()
    rollout = executor.build("rollout", Engine, partial(kill_in_factory, births))
    executor.barrier()
    first, second = (pid for pid, _ in executor.apply(rollout, pid_and_value))
    os.kill(first, signal.SIGKILL)
    with pytest.warns(match="it is replaced") as warned:
        assert rollout.set(7) not in (first, second)
    assert len([w for w in warned if "it is replaced" in str(w.message)]) == 2  # the first new one died as well
    (new, value), kept = executor.apply(rollout, pid_and_value)
    assert value == 7
    assert kept == (second, 7)
    log = (tmp_path / "logs" / "gen-0.log").read_text()
    assert log.index(f"rollout is built in process {first}") < log.index(f"rollout is built in process {new}")
    assert executor.compute(os.getpid) in (new, second)


# --- controllers that go --------------------------------------------------------------------------------------------

CONTROLLER = """
import sys
from rlcore.controller.placement import ResourcePool
from rlcore_ray import RayExecutor
print("connecting", flush=True)
pools = {"train": ResourcePool(processes=int(sys.argv[2])), "gen": ResourcePool()}
executor = RayExecutor(pools, {"actor": "train", "compute": "gen"}, address=sys.argv[1], placement_timeout_s=1000)
print(*[place.pid for pool in executor.pools.values() for place in pool.locations], flush=True)
sys.stdin.read()
"""


def controller(processes: int) -> subprocess.Popen[str]:
    address = ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, address, str(processes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell that runs these tests in the background has SIGINT ignored, which is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def groups() -> list[str]:
    table = ray.util.placement_group_table()
    return [group["state"] for group in table.values() if group["state"] != "REMOVED"]


def test_ctrl_c_while_waiting_for_room(own_cluster: None) -> None:
    holder = ray.util.placement_group([{"CPU": CPUS - 1}])
    assert holder.wait(WAIT_S)
    process = controller(processes=2)
    try:
        assert wait_until(lambda: "PENDING" in groups() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        ray.util.remove_placement_group(holder)
    assert process.returncode == -signal.SIGINT, errors
    assert wait_until(lambda: not groups())


def test_a_killed_controller_takes_its_workers_along(own_cluster: None) -> None:
    """In a cluster that is not its own."""
    process = controller(processes=2)
    assert process.stdout.readline().strip() == "connecting"
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3, process.stderr.read()
    assert all(map(running, pids))
    process.kill()
    process.communicate()
    assert wait_until(lambda: not any(map(running, pids)))
    assert wait_until(lambda: not groups())


GUARDED = """
import os, subprocess, sys, time
from rlcore_ray.guard import Guard
SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]
DAEMON = '''
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], env={})
print(child.pid, flush=True)
time.sleep(1000)
'''
guard = Guard()
other = subprocess.Popen(SLEEP, env={})
with guard.marking():
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True)
    child = int(daemon.stdout.readline())
print(daemon.pid, child, other.pid, flush=True)
if sys.argv[1] == "close":
    guard.close()
    print("closed", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["close", "die"])
def test_the_guard_ends_what_was_started_and_nothing_else(end: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", GUARDED, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    daemon, child, other = map(int, process.stdout.readline().split())
    try:
        if end == "close":
            assert process.stdout.readline().strip() == "closed"
        else:
            process.kill()
            process.wait()
        assert wait_until(lambda: not running(daemon) and not running(child))
        assert running(other)
    finally:
        os.kill(other, signal.SIGKILL)
        process.kill()
        process.communicate()


def test_a_guard_without_anything_to_guard_ends() -> None:
    guard = Guard()
    pid = guard._process.pid
    guard.close()
    assert not running(pid)


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
def test_a_worker_s_failure_is_printed_once(monkeypatch: pytest.MonkeyPatch, debug: bool) -> None:
    failure = WorkerError("actor.train on train[1]: ValueError: no luck\n\nTraceback of the worker")

    @click.command
    def boom() -> None:
        raise failure

    module = types.ModuleType("rlcore_test_boom")
    module.boom = boom  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rlcore_test_boom", module)
    monkeypatch.setitem(_OWN, "boom", ("rlcore_test_boom:boom", ""))
    result = CliRunner().invoke(cli, ["--debug", "boom"] if debug else ["boom"])
    assert result.exit_code == 1
    assert result.output.count("Traceback of the worker") == 1
    assert ("Traceback (most recent call last)" in result.output) == debug
