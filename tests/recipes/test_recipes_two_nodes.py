"""A whole recipe on two Ray nodes, which are simulated on this machine, and what it does when one of them is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from rlcore.cli.command_tree import cli
from rlcore_ray import cluster

pytestmark = pytest.mark.slow

WAIT_S = 400.0
NODES = """
import contextlib, sys
import psutil
import rlcore_ray
from ray.cluster_utils import Cluster
from rlcore_ray.cluster import _on_loopback

# a lost node is noticed within seconds
noticing = {"health_check_initial_delay_ms": 5000, "health_check_period_ms": 1000, "health_check_failure_threshold": 10}
with _on_loopback():
    head = dict(num_cpus=6, num_gpus=1, include_dashboard=False, node_ip_address="127.0.0.1", _system_config=noticing)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        print(cluster.address, flush=True)
        node = None
        for line in sys.stdin:
            if line.startswith("add"):
                node = cluster.add_node(num_cpus=int(line.split()[1]), node_ip_address="127.0.0.1")
            elif line.startswith("remove") and node is not None:
                raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
                gone = raylet.children(recursive=True)  # a machine fails with all of its processes, together
                cluster.remove_node(node, allow_graceful=False)
                for process in gone:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(gone, timeout=60)
                node = None
            print("done", flush=True)
    finally:
        cluster.shutdown()
"""
REWARD = """
import os, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    '''The share of lower-case letters. After the second step it waits for a signal to continue.'''
    metrics = {metrics!r}
    if {waits} and os.path.exists(metrics) and len(open(metrics).readlines()) >= 2:
        if not os.path.exists({go!r}):
            open({waiting!r}, "a").close()
        until = time.monotonic() + 120
        while not os.path.exists({go!r}) and time.monotonic() < until:
            time.sleep(0.05)
    return sum(c.isascii() and c.islower() for c in solution_str) / 8
"""
RUN = {
    "actor.fsdp.device": "cpu",
    "actor.optim": {"lr": 1e-3, "eps": 1e-4},  # see test_recipes_placement
    "actor.objective.kl_loss.coeff": 0.01,
    "trainer.total_steps": 4,
    "trainer.save_freq": 1,
    "trainer.async_save": False,
    "trainer.save_hf": True,
    "reward.timeout_s": 150,
}


# Ray (2.60) gives its daemons 30 seconds to start, and aborts where a busy machine needs longer.
TIMEOUTS = {
    "OMP_NUM_THREADS": "1",
    "RAY_raylet_start_wait_time_s": "200",
    "RAY_agent_register_timeout_ms": "200000",
}


class Nodes:
    """A head node with 6 CPUs and (for the scheduler only) a GPU, and at times a second node."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **TIMEOUTS},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the head node did not start; see the output"

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == "done"

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster.disconnect()  # this process may be connected to another one
    nodes = Nodes()
    yield nodes
    nodes.end()


@pytest.fixture
def second(nodes: Nodes) -> Iterator[Callable[[int], None]]:
    """``second(cpus)`` adds the second node; it leaves with the test."""
    yield lambda cpus: nodes.tell(f"add {cpus}")
    nodes.tell("remove")


@pytest.fixture(scope="module")
def alone(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in this process alone."""
    folder = tmp_path_factory.mktemp("alone")
    result = task.run("grpo", folder, RUN)
    assert result.exit_code == 0, result.output
    return folder


class Started:
    """A run on the cluster, which waits in its third step until `go_on`."""

    def __init__(self, task: Any, nodes: Nodes, folder: Path, changes: dict[str, Any], waits: bool) -> None:
        self.out_dir, self.go, self.waiting = folder / "out", folder / "go", folder / "waiting"
        reward = folder / "reward.py"
        metrics = str(self.out_dir / "metrics.jsonl")
        reward.write_text(REWARD.format(metrics=metrics, go=str(self.go), waiting=str(self.waiting), waits=waits))
        ray_keys = {"controller.kind": "ray", "controller.address": nodes.address, "controller.call_timeout_s": 600}
        keys = {**RUN, "reward.path": f"{reward}:compute_score", **ray_keys, **changes}
        (self.process,) = task.fork("grpo", self.out_dir, keys)

    def wait_until_it_waits(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.waiting.exists():
            if self.process.poll() is not None:
                raise AssertionError(self.process.stdout.read())
            assert time.monotonic() < deadline, "the run did not come to its third step"
            time.sleep(0.05)

    def go_on(self) -> None:
        self.go.touch()

    def end(self) -> str:
        output, _ = self.process.communicate(timeout=WAIT_S)
        return str(output)


@pytest.fixture
def start(task: Any, nodes: Nodes, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """``start(changes, waits)`` starts a run; what is left of it ends with the test."""
    started: list[Started] = []

    def run(changes: dict[str, Any], waits: bool = True) -> Started:
        started.append(Started(task, nodes, tmp_path, changes, waits))
        return started[-1]

    yield run
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGKILL)
            one.process.wait(timeout=30)


def assert_same_weights(alone: Path, out_dir: Path) -> None:
    one, other = (load_file(folder / "model/model.safetensors") for folder in (alone, out_dir))
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 5e-6


TRAINERS_APART = {
    "controller.pools": {
        "train": {"processes": 2, "strategy": "strict_spread"},
        "gen": {"processes": 2, "strategy": "spread"},
    },
    "controller.placement": {"actor": "train", "ref": "train", "rollout": "gen"},
}


def test_a_recipe_runs_across_both_and_ends_as_alone(
    task: Any, nodes: Nodes, second: Callable[[int], None], start: Callable[..., Started], alone: Path, tmp_path: Path
) -> None:
    second(2)
    arguments = ["plan", *task.arguments("grpo", tmp_path / "out", {**RUN, **TRAINERS_APART})[1:]]
    arguments += ["controller.kind=ray", f"controller.address={nodes.address}"]
    plan = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert plan.exit_code == 0, plan.output
    assert "the free resources suffice" in plan.output
    assert plan.output.count("1 × train") == 2
    run = start(TRAINERS_APART, waits=False)
    output = run.end()
    assert run.process.returncode == 0, output
    assert_same_weights(alone, run.out_dir)


def test_a_rollout_process_lost_with_its_node_is_replaced_on_the_other(
    nodes: Nodes, second: Callable[[int], None], start: Callable[..., Started], alone: Path
) -> None:
    second(1)  # for one of the rollout processes: the trainer needs the GPU of the other node
    run = start(
        {
            "controller.pools": {"train": {"gpus_per_process": 0.5}, "gen": {"processes": 2, "strategy": "spread"}},
            "controller.placement": {"actor": "train", "ref": "train", "rollout": "gen"},
            "controller.max_restarts": 0,
        }
    )
    run.wait_until_it_waits()
    nodes.tell("remove")
    run.go_on()
    output = run.end()
    assert run.process.returncode == 0, output
    # twice if Ray has not heard of the node's end yet, and tries there first
    assert output.count("it is replaced") in (1, 2), output
    assert_same_weights(alone, run.out_dir)


def test_trainers_start_again_from_the_checkpoint_on_what_is_left(
    nodes: Nodes, second: Callable[[int], None], start: Callable[..., Started], alone: Path
) -> None:
    second(1)
    run = start(
        {
            "controller.pools": {"all": {"processes": 2, "strategy": "spread"}},
            "controller.restart_backoff_s": 1,
        }
    )
    run.wait_until_it_waits()
    nodes.tell("remove")
    run.go_on()
    output = run.end()
    assert run.process.returncode == 0, output
    assert "restart 1 of 3" in output
    assert_same_weights(alone, run.out_dir)


def test_trainers_that_find_no_place_any_more_end_with_what_is_missing(
    nodes: Nodes, second: Callable[[int], None], start: Callable[..., Started]
) -> None:
    second(2)
    pools = {"train": {"processes": 2, "strategy": "strict_spread"}}
    run = start({"controller.pools": pools, "controller.restart_backoff_s": 0.5, "controller.max_restarts": 2})
    run.wait_until_it_waits()
    nodes.tell("remove")
    run.go_on()
    output = run.end()
    assert run.process.returncode == 1, output
    text = " ".join(output.split())
    assert "needs a separate node for each of its 2 processes of 1 CPU, and only 1 can hold one" in text
    assert "run the same command again to continue from" in text
