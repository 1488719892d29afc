"""Nothing of a run listens beyond what it must, and nothing loads pickles or foreign code."""

from __future__ import annotations

import ast
import ipaddress
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"

# --- what is loaded --------------------------------------------------------------------------------------------------

ALLOWED = {
    "packages/agents/src/rlcore_agents/environment/worker.py": {
        "pickle.loads": "in the contained process, of what the trainer wrote; the way back is JSON",
    },
    "packages/core/src/rlcore/controller/spmd.py": {
        "pickle.loads": "from the other ranks of the same job, through its own process group and store",
    },
    "packages/recipes/src/rlcore_recipes/data/sample_store.py": {
        "pickle.loads": "of samples that this process wrote to its own memory or to a file without a name",
    },
    "packages/rewards/src/rlcore_rewards/calling.py": {
        "cloudpickle.loads": "in the contained process, of a function that the user names or gives to rlcore.train",
    },
    "packages/rewards/src/rlcore_rewards/worker.py": {
        "pickle.loads": "in the contained process, of what the trainer wrote; the way back is JSON",
    },
}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}


def name_of(function: ast.expr) -> str:
    """``a.b.c`` of a called name; empty for other expressions."""
    parts: list[str] = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join([function.id, *reversed(parts)]) if isinstance(function, ast.Name) else ""


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def imported(tree: ast.AST) -> dict[str, str]:
    """Return what local names refer to: ``{"loads": "pickle.loads", "np": "numpy"}``."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def findings(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that loads pickles or foreign code."""
    tree = ast.parse(source)
    names, safe_loaders = imported(tree), loaders(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in UNPICKLERS - {"torch"}:
            yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names if a.name in ("load", "Unpickler"))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            defaults = [*zip(arguments[len(arguments) - len(node.args.defaults) :], node.args.defaults)]
            for argument, default in [*defaults, *zip(node.args.kwonlyargs, node.args.kw_defaults)]:
                if argument.arg in ("trust_remote_code", "allow_pickle") and is_true(default):
                    yield node.lineno, f"{argument.arg}=True"
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = name_of(node.func).partition(".")
        called = ".".join([names.get(first, first), *([rest] if rest else [])])
        module, _, function = called.rpartition(".")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        careful = module == "torch" and is_true(keywords.get("weights_only"))
        if module in UNPICKLERS and function in ("load", "loads", "Unpickler", "open") and not careful:
            yield node.lineno, called
        if module == "yaml" and function.endswith(("load", "load_all")) and not function.startswith("safe"):
            loader = keywords.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if loader is None or name_of(loader) not in safe_loaders:
                yield node.lineno, called
        for keyword in ("trust_remote_code", "allow_pickle"):
            if is_true(keywords.get(keyword)):
                yield node.lineno, f"{keyword}=True"


def loaders(tree: ast.AST) -> set[str]:
    """YAML loaders that make plain values only: the safe one and a module's own that are built on it."""
    found = {"yaml.SafeLoader"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and found & {name_of(base) for base in node.bases}:
            found.add(node.name)
    return found


def test_what_loads_pickles_is_found_however_it_is_written() -> None:
    source = """
import pickle, torch, yaml
import pickle as p
from pickle import loads as read
from torch import load
import numpy as np
pickle.loads(x); p.load(x); read(x); pickle.Unpickler(x)
torch.load(x); load(x, weights_only=False); torch.load(x, weights_only=True); load(x, weights_only=True)
yaml.load(x); yaml.unsafe_load(x); yaml.safe_load(x)
np.load(x, allow_pickle=True); np.load(x, allow_pickle=False)
AutoModel.from_pretrained(x, trust_remote_code=True); AutoModel.from_pretrained(x, trust_remote_code=settings.trust)
def f(x, trust_remote_code=True): json.loads(x); pickle.dumps(x)
def g(x, *, trust_remote_code=False): ...
"""
    assert sorted(findings(source)) == [
        (7, "pickle.Unpickler"),
        (7, "pickle.load"),
        (7, "pickle.loads"),
        (7, "pickle.loads"),
        (8, "torch.load"),
        (8, "torch.load"),
        (9, "yaml.load"),
        (9, "yaml.unsafe_load"),
        (10, "allow_pickle=True"),
        (11, "trust_remote_code=True"),
        (12, "trust_remote_code=True"),
    ]


def test_nothing_loads_pickles_or_foreign_code() -> None:
    root = PACKAGES.parent
    found: dict[str, dict[str, list[int]]] = {}
    for file in sorted(PACKAGES.glob("*/src/**/*.py")):
        for line, name in findings(file.read_text()):
            found.setdefault(str(file.relative_to(root)), {}).setdefault(name, []).append(line)
    assert {path: set(names) for path, names in found.items()} == {
        path: set(reasons) for path, reasons in ALLOWED.items()
    }, found


def test_remote_code_is_off_unless_asked_for() -> None:
    from rlcore.engines import ModelSettings

    assert ModelSettings.model_fields["trust_remote_code"].default is False


# --- who listens -----------------------------------------------------------------------------------------------------


class Trainer:
    """Joins its pool's process group by a collective, so that all of its connections are made."""

    def __init__(self, engines: Any) -> None:
        from torch import distributed as dist

        self.dp_rank, self.dp_size = dist.get_rank(), dist.get_world_size()
        self.device = "cpu"

    def export_weights(self, bucket_bytes: int) -> Iterator[Any]:
        import torch
        from torch import distributed as dist

        from rlcore.engines import WeightBucket

        total = torch.ones(1)
        dist.all_reduce(total)
        yield WeightBucket((("w", total),))


class Rollout:
    takes_adapters = False

    def __init__(self, engines: Any) -> None:
        self.weights: dict[str, Any] = {}
        self.device = "cpu"

    def update_weights(self, buckets: Any, version: int) -> None:
        for bucket in buckets:
            self.weights |= {name: tensor.clone() for name, tensor in bucket.tensors}


def listening(pid: int) -> dict[tuple[int, str, str], str]:
    """Of a process and all below it: (process, kind, address) of every socket that others can connect to."""
    import psutil

    found = {}
    this = psutil.Process(pid)
    for process in [this, *this.children(recursive=True)]:
        try:
            command = " ".join(process.cmdline()[:3])
            connections = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        for connection in connections:
            tcp = connection.type == socket.SOCK_STREAM
            if connection.status == psutil.CONN_LISTEN or (not tcp and connection.laddr and not connection.raddr):
                kind = "tcp" if tcp else "udp"
                found[process.pid, kind, f"{connection.laddr.ip}"] = f"{command} {kind} {connection.laddr}"
    return found


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


@pytest.fixture
def by_value() -> Iterator[None]:
    """Send this module to workers, which cannot import it; leave the cluster that other tests of the process share."""
    import ray

    from rlcore_ray import cluster

    if ray.is_initialized():
        cluster.disconnect()
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@contextmanager
def everything(address: str | None, transport: Literal["gloo", "shm"]) -> Iterator[tuple[Any, Any, Any]]:
    """Pools that hold a trainer of two processes and a rollout, after weights went from one to the other."""
    from rlcore.controller.placement import ResourcePool
    from rlcore.engines import RolloutEngine, TrainEngine
    from rlcore.engines.settings import WeightSyncSettings
    from rlcore_ray import RayExecutor

    pools = {"train": ResourcePool(processes=2, cpus_per_process=0.5), "gen": ResourcePool(cpus_per_process=0.5)}
    placement = {"actor": "train", "rollout": "gen", "compute": "gen"}
    executor = RayExecutor(pools, placement, address=address, call_timeout_s=120)
    try:
        actor = executor.build("actor", TrainEngine, Trainer)  # type: ignore[type-abstract]
        rollout = executor.build("rollout", RolloutEngine, Rollout)  # type: ignore[type-abstract]
        executor.barrier()
        executor.sync_weights(actor, rollout, 1, WeightSyncSettings(transport=transport))
        (received,) = executor.apply(rollout, lambda engine: engine.weights["w"].tolist())
        assert received == [2.0]
        yield executor, actor, rollout
    finally:
        executor.close()


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_a_cluster_of_our_own_listens_on_loopback_only(by_value: None, transport: Literal["gloo", "shm"]) -> None:
    import psutil

    before = set(psutil.Process().children(recursive=True))
    with everything(None, transport):
        found = listening(psutil.Process().pid)
    assert len({pid for pid, _, _ in found}) >= 5  # Ray's daemons and three workers
    assert any("raylet" in text for text in found.values())
    assert [text for (_, _, address), text in found.items() if not is_loopback(address)] == []
    _, left = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=20)
    assert left == []


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1"]))


def own_sockets(engine: Any = None) -> list[str]:
    return sorted(address for pid, kind, address in listening(os.getpid()) if kind == "tcp")


@pytest.mark.slow
def test_workers_of_a_cluster_bind_to_its_address_only(by_value: None) -> None:
    """Ports that Ray opens in its processes are the responsibility of its operator; all others are checked here."""
    import ray
    from ray.cluster_utils import Cluster

    host = "127.0.0.2"  # an address of this machine that is none of the usual ones
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "node_ip_address": host})
    try:
        with everything(cluster.address, "gloo") as (executor, actor, rollout):
            assert {node["NodeManagerAddress"] for node in ray.nodes()} == {host}
            plain = Counter(ray.get(ray.remote(num_cpus=0)(own_sockets).remote(), timeout=60))
            ours = [Counter(sockets) - plain for sockets in executor.apply(actor, own_sockets)]
            ours += [Counter(sockets) - plain for sockets in executor.apply(rollout, own_sockets)]
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sum(map(len, ours)) > 0
    assert {address for sockets in ours for address in sockets} <= {host, "127.0.0.1", f"::ffff:{host}"}


def test_an_address_has_an_interface() -> None:
    import psutil

    from rlcore_ray.worker import interface_of

    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and not is_loopback(address.address):
                assert interface_of(address.address) == name
    assert interface_of("127.0.0.1") == interface_of("127.0.0.2") == interface_of("localhost")
    assert interface_of("203.0.113.77") is None
