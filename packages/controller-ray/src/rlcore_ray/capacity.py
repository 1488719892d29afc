"""Whether pools fit into a cluster: the resources of each node, the free ones, and the jobs that use the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any

import ray
from ray._private import state  # no public function gives free resources by node, actors and jobs
from ray.util import placement_group_table

from rlcore.controller.backend import RESOURCES, Node, resources_text
from rlcore.controller.placement import ResourcePool
from rlcore.errors import PlacementError

ROUNDING = 1e-6
ENTRYPOINT_SHOWN = 80
"""Maximum characters of another job's command line in messages."""


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's description of every node that is alive."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def nodes() -> list[Node]:
    """Return all nodes that are alive."""
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
    """Return the resources of one process of ``pool`` under Ray's names."""
    wanted = {"CPU": pool.cpus_per_process, "GPU": pool.gpus_per_process}
    return {name: amount for name, amount in wanted.items() if amount}


def check_fits(pools: Mapping[str, ResourcePool]) -> None:
    """Check, without waiting, that ``pools`` could run on this cluster if no other job used it.

    Raises:
        PlacementError: all nodes together have too few resources, or no assignment of a pool to nodes exists.
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
    """Return why the pool ``name`` cannot be placed on nodes with the resources ``offered``; None if it can."""
    capacities = [_processes_that_fit(pool, node) for node in offered]
    each = f"{pool.processes} processes of {resources_text(requested(pool))}"
    if not any(capacities):
        return f"no single node can hold a process of the pool {name!r}"
    if pool.strategy == "strict_spread" and sum(map(bool, capacities)) < pool.processes:
        able = sum(map(bool, capacities))
        return f"the pool {name!r} needs a separate node for each of its {each}, and only {able} can hold one"
    if pool.strategy == "strict_pack" and max(capacities) < pool.processes:
        return f"the pool {name!r} needs its {each} on one node, and no node holds more than {max(capacities)}"
    if sum(capacities) < pool.processes:
        held = ", ".join(map(str, sorted(capacities)))
        return f"the pool {name!r} needs {each}, and the nodes hold {held} of them (a process does not span nodes)"
    return None


def assign(pools: Mapping[str, ResourcePool], there: Sequence[Node]) -> dict[str, list[Node]] | None:
    """Return a node for every process, by the resources that are free now; None if no assignment was found.

    Ray may choose other nodes.
    """
    free = {node.node_id: dict(node.free) for node in there}
    found: dict[str, list[Node]] = {}
    hardest = sorted(pools, key=lambda name: _difficulty(pools[name]), reverse=True)
    for name in hardest:
        pool, chosen = pools[name], []
        if pool.strategy == "strict_pack":
            able = [node for node in there if _processes_that_fit(pool, free[node.node_id]) >= pool.processes]
            chosen = able[:1] * pool.processes
        else:
            for _ in range(pool.processes):
                able = [node for node in there if _processes_that_fit(pool, _less(free, node, pool, chosen)) >= 1]
                if pool.strategy == "strict_spread":
                    able = [node for node in able if node not in chosen]
                if not able:
                    break
                # pack on few nodes, or spread over many
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
    """Return a message: why ``pools`` cannot be placed, what they need, what the cluster has and which jobs use it."""
    needed = "; ".join(
        f"{name}: {pool.processes} processes of {resources_text(requested(pool))} ({pool.strategy})"
        for name, pool in pools.items()
    )
    lines = [
        f"  node {node}: {resources_text(node.total)}, of which free: {resources_text(node.free)}" for node in nodes()
    ]
    held = holders(own={group_name(name) for name in pools})
    return "\n".join(
        [
            f"the pools cannot be placed: {reason}",
            f"needed: {needed}",
            "the cluster has:",
            *lines,
            *(["used by:", *(f"  {line}" for line in held)] if held else ["no other job uses any of it"]),
            "lower controller.pools.*.processes or the resources of each process, place roles together, or add nodes",
        ]
    )


def group_name(pool: str) -> str:
    """Return the name of a pool's placement group."""
    return f"rlcore {pool}"


def holders(own: Collection[str] = ()) -> list[str]:
    """Return a line for each user of CPUs and GPUs on each node.

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
                found.append(f"{resources_text(total)} on node {there[key]}: {name!r} of {_job(jobs, job)}")
    actors: dict[str, list[str]] = {}
    for actor in state.actors().values():
        if actor["State"] == "ALIVE":
            title = actor["Name"] or actor["ActorClassName"]
            actors.setdefault(actor["Address"]["NodeID"], []).append(f"{title!r} of {_job(jobs, actor['JobID'])}")
    for key, amounts in rest.items():
        left = {name: amount if amount > ROUNDING else 0 for name, amount in amounts.items()}
        if any(left.values()):
            who = [f"{title} ({len(list(same))})" for title, same in groupby(sorted(actors.get(key, [])))]
            found.append(
                f"{resources_text(left)} on node {there[key]}: tasks or actors there; its actors: {', '.join(who)}"
            )
    return found


def _processes_that_fit(pool: ResourcePool, offered: Mapping[str, float]) -> int:
    """Return how many processes of ``pool`` one node can hold; a fraction of a GPU is a fraction of a single GPU."""
    capacities = []
    for name, amount in requested(pool).items():
        free = offered.get(name, 0.0) + ROUNDING
        if name == "GPU" and amount < 1:
            capacities.append(math.floor(free) * math.floor(1 / amount + ROUNDING) + math.floor(free % 1 / amount))
        else:
            capacities.append(math.floor(free / amount))
    return min(capacities, default=pool.processes)


def _less(free: Mapping[str, Mapping[str, float]], node: Node, pool: ResourcePool, chosen: Sequence[Node]) -> Any:
    """Return what is free on ``node`` after its share of the ``chosen`` processes of ``pool``."""
    taken = chosen.count(node)
    return {name: free[node.node_id][name] - taken * requested(pool).get(name, 0) for name in RESOURCES}


def _difficulty(pool: ResourcePool) -> tuple[bool, float, float]:
    return pool.strategy.startswith("strict"), pool.gpus_per_process, pool.cpus_per_process


def _total(bundles: Any) -> dict[str, float]:
    taken = list(bundles)
    return {name: sum(bundle.get(name, 0) for bundle in taken) for name in RESOURCES}


def _job(jobs: Mapping[str, Any], job: str) -> str:
    """Return a job as its owner knows it: number, command line, process."""
    if job not in jobs:
        return f"job {job}"
    entrypoint = " ".join(jobs[job]["Entrypoint"].split())[:ENTRYPOINT_SHOWN]
    return f"job {job} ({entrypoint}, process {jobs[job]['DriverPid']} on {jobs[job]['DriverIPAddress']})"
