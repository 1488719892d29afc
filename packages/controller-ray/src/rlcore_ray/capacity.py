"""Whether pools fit into a cluster: what each node has, what is free, and who holds the rest."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import ray
from ray._private import state  # has what no public function tells: free resources by node, actors and jobs
from ray.util import placement_group_table

from rlcore.controller.placement import ResourcePool
from rlcore.errors import PlacementError

RESOURCES = ("CPU", "GPU")
ROUNDING = 1e-6
ENTRYPOINT_SHOWN = 80
"""Characters of another job's command line in messages."""


@dataclass(frozen=True)
class Node:
    """A node that is up.

    Attributes:
        total: CPU and GPU that it has; ``free`` those that nobody holds now.
    """

    node_id: str
    host: str
    total: dict[str, float]
    free: dict[str, float]

    def __str__(self) -> str:
        return f"{self.host} ({self.node_id[:6]})"


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's description of every node that is up."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def nodes() -> list[Node]:
    """All nodes that are up."""
    free = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            {name: node["Resources"].get(name, 0.0) for name in RESOURCES},
            {name: free.get(node["NodeID"], {}).get(name, 0.0) for name in RESOURCES},
        )
        for node in alive_nodes()
    ]


def requested(pool: ResourcePool) -> dict[str, float]:
    """Ray's resources for one process of ``pool``."""
    asked = {"CPU": pool.cpus_per_process, "GPU": pool.gpus_per_process}
    return {name: amount for name, amount in asked.items() if amount}


def check_fits(pools: Mapping[str, ResourcePool]) -> None:
    """See at once whether ``pools`` could ever run on this cluster, if nobody else used it.

    Raises:
        PlacementError: all its nodes together have too little, or they have it in the wrong places for one pool.
    """
    there = nodes()
    for resource in RESOURCES:
        wanted = sum(pool.processes * requested(pool).get(resource, 0) for pool in pools.values())
        offered = sum(node.total[resource] for node in there)
        if wanted > offered + ROUNDING:
            raise PlacementError(unplaceable(pools, f"the cluster has {offered:g} {resource}, not {wanted:g}"))
    for name, pool in pools.items():
        reason = obstacle(name, pool, [node.total for node in there])
        if reason is not None:
            raise PlacementError(unplaceable(pools, reason))


def obstacle(name: str, pool: ResourcePool, offered: Sequence[Mapping[str, float]]) -> str | None:
    """Why the pool ``name`` can not be placed on nodes that offer so much; None if it can."""
    rooms = [_processes_that_fit(pool, node) for node in offered]
    each = f"{pool.processes} processes of {listed(requested(pool))}"
    if not any(rooms):
        return f"no single node can hold a process of the pool {name!r}"
    if pool.strategy == "strict_spread" and sum(map(bool, rooms)) < pool.processes:
        able = sum(map(bool, rooms))
        return f"the pool {name!r} wants each of its {each} on a node of its own, and {able} could take one"
    if pool.strategy == "strict_pack" and max(rooms) < pool.processes:
        return f"the pool {name!r} wants its {each} on one node, and no node holds more than {max(rooms)}"
    if sum(rooms) < pool.processes:
        held = ", ".join(map(str, sorted(rooms)))
        return f"the pool {name!r} wants {each}, and the nodes hold {held} of them (a process does not span nodes)"
    return None


def assign(pools: Mapping[str, ResourcePool], there: Sequence[Node]) -> dict[str, list[Node]] | None:
    """A node for every process, by what is free now; None if no way was found. Ray may choose another one."""
    free = {node.node_id: dict(node.free) for node in there}
    found: dict[str, list[Node]] = {}
    hardest = sorted(pools, key=lambda name: _difficulty(pools[name]), reverse=True)
    for name in hardest:
        pool, chosen = pools[name], []
        if pool.strategy == "strict_pack":
            room = [node for node in there if _processes_that_fit(pool, free[node.node_id]) >= pool.processes]
            chosen = room[:1] * pool.processes
        else:
            for _ in range(pool.processes):
                able = [node for node in there if _processes_that_fit(pool, _less(free, node, pool, chosen)) >= 1]
                if pool.strategy == "strict_spread":
                    able = [node for node in able if node not in chosen]
                if not able:
                    break
                # on few nodes, or on many
                order = 1 if pool.strategy == "pack" else -1
                chosen.append(max(able, key=lambda node: order * chosen.count(node)))
        if len(chosen) < pool.processes:
            return None
        for node in set(map(there.index, chosen)):
            taken = _less(free, there[node], pool, chosen)
            free[there[node].node_id] = taken
        found[name] = chosen
    return {name: found[name] for name in pools}


def unplaceable(pools: Mapping[str, ResourcePool], reason: str) -> str:
    """What was asked for, what the cluster has, and what holds the rest."""
    asked = "; ".join(
        f"{name}: {pool.processes} processes of {listed(requested(pool))} ({pool.strategy})"
        for name, pool in pools.items()
    )
    lines = [f"  node {node}: {listed(node.total)}, of which free: {listed(node.free)}" for node in nodes()]
    held = holders(own={group_name(name) for name in pools})
    return "\n".join(
        [
            f"the pools cannot be placed: {reason}",
            f"asked for: {asked}",
            "the cluster has:",
            *lines,
            *(["held by:", *(f"  {line}" for line in held)] if held else ["nobody else holds any of it"]),
            "lower controller.pools.*.processes or what each process gets, place roles together, or add nodes",
        ]
    )


def group_name(pool: str) -> str:
    """The name of a pool's placement group."""
    return f"rlcore {pool}"


def holders(own: Collection[str] = ()) -> list[str]:
    """Who else holds CPUs and GPUs, and where: a line for each.

    Args:
        own: names of this job's placement groups, which are left out.
    """
    there = {node.node_id: node for node in nodes()}
    jobs = {job["JobID"]: job for job in state.jobs()}  # type: ignore[no-untyped-call]
    here = ray.get_runtime_context().get_job_id()
    rest = {key: {name: node.total[name] - node.free[name] for name in RESOURCES} for key, node in there.items()}
    found = []
    for group in placement_group_table().values():
        job = group["placement_group_id"][-8:]  # ids end with that of the job
        where = {index: key for index, key in group["bundles_to_node_id"].items() if key in there}  # none while pending
        if group["state"] == "REMOVED" or not where:
            continue
        for key in set(where.values()):
            total = _total(group["bundles"][index] for index, node in where.items() if node == key)
            for name in RESOURCES:
                rest[key][name] -= total[name]
            if any(total.values()) and not (job == here and group["name"] in own):
                name = group["name"] or "a placement group without a name"
                found.append(f"{listed(total)} on node {there[key]}: {name!r} of {_job(jobs, job)}")
    actors: dict[str, list[str]] = {}
    for actor in state.actors().values():
        if actor["State"] == "ALIVE":
            title = actor["Name"] or actor["ActorClassName"]
            actors.setdefault(actor["Address"]["NodeID"], []).append(f"{title!r} of {_job(jobs, actor['JobID'])}")
    for key, amounts in rest.items():
        left = {name: amount if amount > ROUNDING else 0 for name, amount in amounts.items()}
        if any(left.values()):
            who = [f"{title} ({len(list(same))})" for title, same in groupby(sorted(actors.get(key, [])))]
            found.append(f"{listed(left)} on node {there[key]}: tasks or actors there; its actors: {', '.join(who)}")
    return found


def listed(resources: Mapping[str, float]) -> str:
    """CPU and GPU, as in "2 CPU, 0.5 GPU"."""
    shown = [f"{resources[name]:g} {name}" for name in RESOURCES if resources.get(name)]
    return ", ".join(shown) or "nothing"


def _processes_that_fit(pool: ResourcePool, offered: Mapping[str, float]) -> int:
    """How many processes of ``pool`` one node can take; a fraction of a GPU is one of a single GPU."""
    rooms = []
    for name, amount in requested(pool).items():
        free = offered.get(name, 0.0) + ROUNDING
        if name == "GPU" and amount < 1:
            rooms.append(math.floor(free) * math.floor(1 / amount + ROUNDING) + math.floor(free % 1 / amount))
        else:
            rooms.append(math.floor(free / amount))
    return min(rooms, default=pool.processes)


def _less(free: Mapping[str, Mapping[str, float]], node: Node, pool: ResourcePool, chosen: Sequence[Node]) -> Any:
    """What is free on ``node`` after its share of the ``chosen`` processes of ``pool``."""
    taken = chosen.count(node)
    return {name: free[node.node_id][name] - taken * requested(pool).get(name, 0) for name in RESOURCES}


def _difficulty(pool: ResourcePool) -> tuple[bool, float, float]:
    return pool.strategy.startswith("strict"), pool.gpus_per_process, pool.cpus_per_process


def _total(bundles: Any) -> dict[str, float]:
    taken = list(bundles)
    return {name: sum(bundle.get(name, 0) for bundle in taken) for name in RESOURCES}


def _job(jobs: Mapping[str, Any], job: str) -> str:
    """A job as its owner knows it."""
    if job not in jobs:
        return f"job {job}"
    entrypoint = " ".join(jobs[job]["Entrypoint"].split())[:ENTRYPOINT_SHOWN]
    return f"job {job} ({entrypoint}, process {jobs[job]['DriverPid']} on {jobs[job]['DriverIPAddress']})"
