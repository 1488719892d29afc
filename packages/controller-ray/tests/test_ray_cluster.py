"""Placements that do not fit into a cluster of two nodes, of which others hold a part.

The nodes are simulated on this machine and listen on loopback only; their GPU exists for the scheduler alone.
"""

import os
import re
import subprocess
import sys
import threading
import time

import pytest
import ray
import torch

from rlcore.batch import Batch, Jagged
from rlcore.controller.placement import ResourcePool
from rlcore.errors import ConfigError, PlacementError, RlcoreWarning, WorkerDied
from rlcore_ray import RayExecutor, capacity
from rlcore_ray.cluster import _on_loopback, connect, disconnect
from rlcore_ray.pool import SILENT_WAIT_S

IMMEDIATELY_S = 20.0  # no bound on speed: well under the timeouts below
WAIT_S = 300.0
OTHER_JOB = """
import sys, rlcore_ray, ray
from rlcore_ray.cluster import connect
from ray.util.placement_group import placement_group
connect(sys.argv[1], {})
group = placement_group([{"CPU": 1, "GPU": 1}], name="evaluation")
assert group.wait(60)

@ray.remote(num_cpus=1)
class Holder:
    def up(self): return True

holder = Holder.options(name="annotator").remote()
ray.get(holder.up.remote(), timeout=60)
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(forked_workers):
    """A node with 2 CPUs, one with 2 CPUs and a GPU, one with 4 CPUs and 2 GPUs; this process is connected."""
    from ray.cluster_utils import Cluster

    with _on_loopback():
        nodes = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": False,
                "node_ip_address": "127.0.0.1",
                "_system_config": {"health_check_period_ms": 1000, "health_check_failure_threshold": 10},
            },
        )
        nodes.add_node(num_cpus=2, num_gpus=1, node_ip_address="127.0.0.1")
        nodes.add_node(num_cpus=4, num_gpus=2, node_ip_address="127.0.0.1")
    assert connect(nodes.address, {})
    yield nodes
    disconnect()
    nodes.shutdown()


@pytest.fixture
def other_job(cluster):
    """Holds a GPU with a placement group, and a CPU with an actor outside of any."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_JOB, cluster.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.readline().strip() == "holding"
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    wait_until_free()


def wait_until_free() -> None:
    deadline = time.monotonic() + 60
    while any(node.free != node.total for node in capacity.nodes()):
        assert time.monotonic() < deadline, capacity.holders()
        time.sleep(0.1)


def refusal(pools, timeout_s=WAIT_S) -> str:
    start = time.monotonic()
    with pytest.raises(PlacementError) as error:
        RayExecutor(pools, {}, placement_timeout_s=timeout_s)
    if timeout_s == WAIT_S:
        assert time.monotonic() - start < IMMEDIATELY_S
    return str(error.value)


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        ({"processes": 9}, "the cluster has 8 CPU, not 9"),
        ({"processes": 4, "gpus_per_process": 1, "cpus_per_process": 0}, "the cluster has 3 GPU, not 4"),
        (
            {"gpus_per_process": 3},
            "no single node can hold a process of the pool 'train'",
        ),
        (
            {"processes": 3, "strategy": "strict_pack", "gpus_per_process": 1},
            "the pool 'train' needs its 3 processes of 1 CPU, 1 GPU on one node, and no node holds more than 2",
        ),
        (
            {"processes": 4, "strategy": "strict_spread"},
            "the pool 'train' needs a separate node for each of its 4 processes of 1 CPU, and only 3 can hold one",
        ),
        (
            {"processes": 3, "strategy": "strict_spread", "gpus_per_process": 0.5},
            "separate node for each of its 3 processes of 1 CPU, 0.5 GPU, and only 2 can hold one",
        ),
        (
            {"processes": 2, "cpus_per_process": 3},
            "the pool 'train' needs 2 processes of 3 CPU, and the nodes hold 0, 0, 1 of them",
        ),
        (
            {"processes": 4, "cpus_per_process": 0.1, "gpus_per_process": 0.6},
            "the pool 'train' needs 4 processes of 0.1 CPU, 0.6 GPU, and the nodes hold 0, 1, 2 of them",
        ),
    ],
)
def test_what_can_never_be_placed_is_refused_immediately(cluster, pool, reason):
    message = refusal({"train": ResourcePool(**pool)})
    assert reason in message
    assert "needed: train: " in message
    assert len(re.findall(r"node 127\.0\.0\.1 \(\w{6}\): [24] CPU", message)) == 3
    assert "no other job uses any of it" in message
    assert not [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def test_pools_that_fit_alone_but_not_together_are_refused_immediately(cluster):
    message = refusal({"train": ResourcePool(processes=5), "gen": ResourcePool(processes=4)})
    assert "the cluster has 8 CPU, not 9" in message
    assert "needed: train: 5 processes of 1 CPU (pack); gen: 4 processes of 1 CPU (pack)" in message


def test_who_holds_the_rest_is_named_with_job_and_node(cluster, other_job):
    message = refusal({"train": ResourcePool(processes=3, gpus_per_process=1)}, timeout_s=2)
    assert "no free resources for train within 2 s" in message
    where = r"node 127\.0\.0\.1 \(\w{6}\)"
    job = rf"job \w+ \(.*python.*, process {other_job.pid} on 127\.0\.0\.1\)"
    assert re.search(rf"1 CPU, 1 GPU on {where}: 'evaluation' of {job}", message), message
    assert re.search(rf"1 CPU on {where}: tasks or actors there; its actors: .*'annotator' of {job} \(1\)", message), (
        message
    )
    assert "'rlcore train'" not in message  # what this run itself reserved
    assert "of which free: " in message


def test_pools_are_placed_as_soon_as_the_other_job_ends(cluster, other_job):
    ending = threading.Timer(SILENT_WAIT_S + 2, other_job.stdin.close)
    ending.start()
    waiting = "waiting up to 60 s for resources for train; used by other jobs: 1 CPU, 1 GPU on"
    with pytest.warns(RlcoreWarning, match=waiting):
        executor = RayExecutor({"train": ResourcePool(gpus_per_process=1, processes=3)}, {}, placement_timeout_s=60)
    try:
        ending.join()
        assert len({location.node_id for location in executor.pools["train"].locations}) == 2
    finally:
        executor.close()
    other_job.stdin = open(os.devnull)  # noqa: SIM115 (closed by the fixture)


def test_two_halves_of_a_gpu_are_two_processes_on_it(cluster):
    half = ResourcePool(gpus_per_process=0.5, cpus_per_process=0.5, strategy="strict_pack")
    executor = RayExecutor({"train": half, "gen": half, "judge": half}, {})
    try:
        gpus = [(pool.locations[0].node_id, pool.locations[0].gpus) for pool in executor.pools.values()]
        assert all(len(ids) == 1 for _, ids in gpus)
        assert len(set(gpus)) == 2
    finally:
        executor.close()
    wait_until_free()


def test_strategies_decide_on_nodes(cluster):
    pools = {
        "wide": ResourcePool(processes=3, strategy="strict_spread"),
        "close": ResourcePool(processes=3, strategy="strict_pack"),
    }
    proposed = capacity.assign(pools, capacity.nodes())
    assert len({node.node_id for node in proposed["wide"]}) == 3
    assert len({node.node_id for node in proposed["close"]}) == 1
    executor = RayExecutor(pools, {})
    try:
        nodes = {name: {location.node_id for location in pool.locations} for name, pool in executor.pools.items()}
        assert len(nodes["wide"]) == 3
        assert nodes["close"] == {proposed["close"][0].node_id}
    finally:
        executor.close()
    wait_until_free()


def test_nothing_is_proposed_where_nothing_is_free(cluster, other_job):
    assert capacity.assign({"train": ResourcePool(processes=3, gpus_per_process=1)}, capacity.nodes()) is None
    assert capacity.assign({"train": ResourcePool(processes=2, gpus_per_process=1)}, capacity.nodes()) is not None


class Maker:
    """Has nothing to say; `samples` are made in its process."""


def samples(engine: Maker) -> Batch:
    return Batch({"tokens": Jagged.from_list([torch.arange(200_000)] * 3)})


def total(batch: Batch) -> int:
    return int(batch.flat("tokens").sum())


def test_samples_that_are_lost_with_their_node_are_a_death(cluster):
    far = cluster.add_node(num_cpus=5, node_ip_address="127.0.0.1")  # the only one with room for "far"
    executor = RayExecutor(
        {"far": ResourcePool(cpus_per_process=5), "near": ResourcePool()},
        {"maker": "far", "compute": "near"},
        call_timeout_s=120,
    )
    try:
        group = executor.build("maker", Maker, make)
        (kept,) = executor.apply(group, samples)
        assert executor.compute(total, kept) == 3 * sum(range(200_000))
        (lost,) = executor.apply(group, samples)
        cluster.remove_node(far, allow_graceful=False)
        with pytest.raises(WorkerDied, match=r"total on near\[0\]"):
            executor.compute(total, lost)
    finally:
        executor.close()
    wait_until_free()


def make(engines) -> Maker:
    return Maker()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "auto"])
def test_an_address_without_a_cluster_is_an_error(monkeypatch, address):
    """Ray itself would try for minutes, or without end."""
    monkeypatch.setattr("rlcore_ray.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError) as error:
        connect(address, {})
    assert f"controller.address={address}: there is no Ray cluster" in str(error.value)
    assert "nothing listens at 127.0.0.1:1" in str(error.value)


def test_the_address_file_of_a_dead_cluster_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("rlcore_ray.cluster.ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.utils.get_ray_address_file", lambda folder: str(tmp_path / "ray_current_cluster"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"controller\.address=auto: .* \(nothing listens at 127\.0\.0\.1:1"):
        connect("auto", {})
