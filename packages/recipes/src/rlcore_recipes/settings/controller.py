"""Settings of what runs the engines: which processes there are, and which role runs in which."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from rlcore import plugins
from rlcore.config import Config, PluginName, Seconds
from rlcore.controller.backend import EXECUTORS, ExecutorBackend, ExecutorSpec
from rlcore.controller.placement import ResourcePool, complete, pools_of, unknown_pool

ROLES = ("actor", "critic", "ref", "reward_model", "prm", "rollout", "reward", "compute")


def _is_role(name: str) -> str:
    if name not in ROLES and not name.startswith("teacher_"):
        raise PydanticCustomError("role", "must be one of {roles} or teacher_NAME", {"roles": ", ".join(ROLES)})
    return name


Role = Annotated[str, AfterValidator(_is_role)]


class ControllerSettings(Config):
    """The executor of the engines. All keys but ``kind`` are for Ray."""

    kind: Annotated[str, PluginName(EXECUTORS)] = Field(
        "local",
        description="'local': in this process, or in every process that torchrun starts; 'ray': in worker processes of "
        "`pools`, on one machine or many.",
    )
    address: str | None = Field(
        None,
        description="Ray cluster to run on: 'auto' (the one that this machine belongs to) or its address; null starts "
        "Ray on this machine for the length of the run.",
    )
    pools: dict[str, ResourcePool] = Field(
        default_factory=dict, description="Pools of worker processes by name; without any, one process for all models."
    )
    placement: dict[Role, str] = Field(
        default_factory=dict,
        description="Pool of each role. Models go to the only pool or to 'default' unless placed, rewards and the "
        "controller's own work on tokens (compute) to 'cpu'. Roles on one pool share its processes and take turns.",
    )
    placement_timeout_s: Seconds = Field(60.0, gt=0, description="Timeout of the wait for the cluster's resources.")
    call_timeout_s: Seconds = Field(3600.0, gt=0, description="Timeout of a worker's answer to one call.")
    max_restarts: int = Field(
        3, ge=0, description="Fault tolerance: maximum restarts from one checkpoint after a training worker died."
    )
    restart_backoff_s: Seconds = Field(
        5.0, ge=0, description="Wait before the first restart; doubles with every further one, up to five minutes."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.kind == "local":
            for name in ("address", "pools", "placement"):
                if getattr(self, name):
                    yield name, "is for kind=ray; this run has kind=local"
        for role, pool in self.placement.items():
            problem = unknown_pool(pool, self.pools)
            if problem is not None:
                yield f"placement.{role}", problem

    def backend(self, roles: Iterable[str], logs: Path | None = None) -> ExecutorBackend:
        """Return the backend of the executor for ``roles``; its worker processes write to files below ``logs``."""
        pools, placement = self.mapping(roles)
        spec = ExecutorSpec(pools, placement, self.address, logs, self.placement_timeout_s, self.call_timeout_s)
        backend: ExecutorBackend = plugins.get(EXECUTORS, self.kind).build(spec)
        return backend

    def mapping(self, roles: Iterable[str]) -> tuple[dict[str, ResourcePool], dict[str, str]]:
        """Return the pools that ``roles`` use, and the pool of each role."""
        placed = pools_of(self.pools, {str(role): pool for role, pool in self.placement.items()}, roles)
        return complete(self.pools, placed.values()), placed


def unused(controller: ControllerSettings, roles: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the keys of ``controller`` about roles and pools that the run does not have: usually a mistake, which would
    leave processes idle, or a role on another pool than intended."""
    for role in controller.placement:
        if role not in roles:
            yield f"controller.placement.{role}", f"takes no part in this run; its roles are {', '.join(roles)}"
    if any(unknown_pool(pool, controller.pools) for pool in controller.placement.values()):
        return  # reported with the placement
    used = controller.mapping(roles)[1].values()
    for name in controller.pools:
        if name not in used:
            yield f"controller.pools.{name}", "no role is on this pool: place one there, or leave the pool out"
