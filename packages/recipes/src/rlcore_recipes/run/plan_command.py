"""``rlcore plan``: what a run would start, and where, before it does.

Recipes describe themselves: see `Planned` for the attributes that a recipe's configuration may have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Protocol, runtime_checkable

import click
from rich.table import Table
from rich.text import Text

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.cli.console import out
from rlcore.controller.backend import ClusterPlan, ExecutorBackend, resources_text
from rlcore.controller.placement import ResourcePool, replaceable
from rlcore.errors import ConfigError, PlacementError

TRAINED = ("actor", "critic", "prm")


class Controller(Protocol):
    """The section ``controller``: ``kind`` names its plugin, ``address`` its cluster, if there is one."""

    kind: str
    address: str | None

    def backend(self, roles: Sequence[str]) -> ExecutorBackend:
        """Return the backend of the executor for ``roles``."""
        ...

    def mapping(self, roles: Sequence[str]) -> tuple[dict[str, ResourcePool], dict[str, str]]:
        """Return the pools that ``roles`` use, and the pool of each role."""
        ...


@runtime_checkable
class Planned(Protocol):
    """A configuration that can be planned.

    In addition to these two it may have ``arithmetic``, rows of what is counted, how, and the number (samples per step,
    optimizer steps …), and ``weight_sync.transport``.

    Attributes:
        roles: what takes part in the run, in the order in which it is built.
    """

    controller: Any
    roles: Sequence[str]


@click.command(cls=recipes.ConfiguredCommand, params=[recipes.recipe_parameter(), *recipes.configuration_parameters()])
def plan(recipe: str, file: str | None, overrides: tuple[str, ...]) -> None:
    """Print what a run would start, and where, before it does.

    Starts nothing. With controller.address it asks that cluster whether there is room now; the exit code is 1 if not.
    """
    config = recipes.load(plugins.get(recipes.GROUP, recipe), file, overrides)
    if not isinstance(config, Planned):
        raise ConfigError(f"the recipe {recipe} cannot be planned: its configuration has no attribute `roles`")
    if int(os.environ.get("RANK", "0")) > 0:
        return
    controller: Controller = config.controller
    pools, placed = controller.mapping(config.roles)
    if controller.kind == "local":
        _print_local(config.roles)
    else:
        _print_pools(pools, placed)
        out.print()
        for line in [*_concurrency(placed), *_weights(config, pools, placed)]:
            out.print(Text(line))
    _print_arithmetic(config)
    if controller.kind == "local":
        return
    cluster = controller.backend(config.roles).plan()
    if cluster is not None:
        _print_cluster(cluster)
    else:
        _print_own_cluster(pools)


def _print_local(roles: Sequence[str]) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    processes = "this process" if world == 1 else f"each of the {world} processes that torchrun started"
    out.print(Text(f"controller.kind=local: all roles in {processes}; they take turns"))
    out.print(Text(f"roles: {', '.join(roles)}"))
    out.print(Text(f"training processes: {world}" + (" (torchrun starts more)" if world == 1 else "")))
    if "rollout" in roles:
        out.print(Text("weights to the rollout: in the same process"))


def _print_pools(pools: Mapping[str, ResourcePool], placed: Mapping[str, str]) -> None:
    table = _table("pool", "processes", "each process gets", "strategy", "roles", "training", "if a process dies")
    for name, pool in pools.items():
        roles = _on(placed, name)
        trained = [role for role in roles if role in TRAINED]
        table.add_row(
            name,
            str(pool.processes),
            f"{pool.cpus_per_process:g} CPU, {pool.gpus_per_process:g} GPU",
            pool.strategy,
            ", ".join(roles),
            f"{', '.join(trained)}: world size {pool.processes}" if trained else "",
            "it is replaced" if replaceable(roles) else "the run restarts",
        )
    out.print(table)


def _concurrency(placed: Mapping[str, str]) -> list[str]:
    pools = list(dict.fromkeys(placed.values()))
    shared = [pool for pool in pools if len(_on(placed, pool)) > 1 and not replaceable(_on(placed, pool))]
    turns = [f"{', '.join(_on(placed, pool))} ({pool})" for pool in shared]
    pairs = [f"{one} with {other}" for one, other in combinations(pools, 2)]
    return [
        f"take turns: {'; '.join(turns) or 'none'}",
        f"can run at the same time: {'; '.join(pairs) or 'nothing, as there is one pool'}",
    ]


def _weights(config: Any, pools: Mapping[str, ResourcePool], placed: Mapping[str, str]) -> list[str]:
    if "rollout" not in placed:
        return []
    trainer, rollout = placed["actor"], placed["rollout"]
    if trainer == rollout:
        return ["weights to the rollout: in the same process"]
    wanted = config.weight_sync.transport if hasattr(config, "weight_sync") else "auto"
    how = wanted
    if wanted == "auto":
        devices = [pools[name].gpus_per_process > 0 for name in (trainer, rollout)]
        same, apart = ("ipc", "nccl") if all(devices) else ("shm", "gloo")
        how = f"{same} on one {'GPU' if all(devices) else 'machine'}, else {apart}"
    copies = pools[rollout].processes
    return [f"weights to the rollout: {trainer}[0] to {copies} process{'es' * (copies > 1)} of {rollout}, by {how}"]


def _print_arithmetic(config: Any) -> None:
    rows: Sequence[tuple[str, str, str]] = getattr(config, "arithmetic", ())
    if not rows:
        return
    out.print()
    table = _table("", "number", "how")
    for what, how, number in rows:
        table.add_row(what, number, how)
    out.print(table)


def _print_own_cluster(pools: Mapping[str, ResourcePool]) -> None:
    processes = sum(pool.processes for pool in pools.values())
    cpus = sum(pool.processes * pool.cpus_per_process for pool in pools.values())
    gpus = sum(pool.processes * pool.gpus_per_process for pool in pools.values())
    cores = os.cpu_count() or 1
    slower = "; they share cores, which is slower but works" if cpus > cores else ""
    out.print()
    out.print(
        Text(
            f"Ray on this machine, for the length of the run: {processes} processes for {cpus:g} CPU of {cores}"
            f"{slower}" + (f"; {gpus:g} GPU are needed here" if gpus else "")
        )
    )


def _print_cluster(plan: ClusterPlan) -> None:
    """Print the nodes of the cluster, and where the processes would run now.

    Raises:
        PlacementError: too few resources are free now.
    """
    out.print()
    out.print(_nodes_table(plan))
    if plan.problem:
        raise PlacementError(plan.problem)
    out.print(Text("the free resources suffice; the processes may be placed on other nodes"))


def _nodes_table(plan: ClusterPlan) -> Table:
    table = _table("node", "has", "free now", "would run")
    for node in plan.nodes:
        counts = {pool: list(chosen).count(node) for pool, chosen in plan.assigned.items()}
        runs = ", ".join(f"{count} × {pool}" for pool, count in counts.items() if count)
        table.add_row(str(node), resources_text(node.total), resources_text(node.free), runs)
    return table


def _on(placed: Mapping[str, str], pool: str) -> list[str]:
    return [role for role, name in placed.items() if name == pool]


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table
