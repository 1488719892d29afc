"""`ExecutorBackend`: what a plugin of the group ``rlcore.executors`` builds.

`start` starts an executor. `plan` looks at the cluster without starting anything, for ``rlcore plan``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlcore.controller.executor import Executor
from rlcore.controller.local import LocalExecutor, process_executor
from rlcore.controller.placement import ResourcePool

EXECUTOR_INTERFACE = 1
EXECUTORS = "rlcore.executors"
RESOURCES = ("CPU", "GPU")


@dataclass(frozen=True)
class ExecutorSpec:
    """Everything a plugin needs to build one `ExecutorBackend`.

    Attributes:
        pools: worker processes by the name of their pool.
        placement: the pool of every role.
        address: of the cluster to run on; None if there is no cluster but this machine.
        logs: folder for the output of worker processes; None leaves it where the backend puts it.
        placement_timeout_s: timeout for the cluster to grant the pools' resources, in seconds.
        call_timeout_s: timeout of one call in a worker, in seconds.
    """

    pools: Mapping[str, ResourcePool] = field(default_factory=dict)
    placement: Mapping[str, str] = field(default_factory=dict)
    address: str | None = None
    logs: Path | None = None
    placement_timeout_s: float = 60.0
    call_timeout_s: float = 3600.0


@dataclass(frozen=True)
class Node:
    """A machine of a cluster.

    Attributes:
        total: number of CPUs and GPUs that the node has, by `RESOURCES`; ``free`` of these, the ones not in use.
    """

    node_id: str
    host: str
    total: Mapping[str, float]
    free: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.host} ({self.node_id[:6]})"


@dataclass(frozen=True)
class ClusterPlan:
    """Where the processes of a run would be placed now.

    Attributes:
        assigned: the node of every process, by pool; empty if the free resources do not suffice.
        problem: why they do not suffice; "" if they do.
    """

    nodes: Sequence[Node]
    assigned: Mapping[str, Sequence[Node]]
    problem: str = ""


class ExecutorBackend(ABC):
    """An executor that can be started, and the resources that it would run on."""

    def __init__(self, spec: ExecutorSpec) -> None:
        self.spec = spec

    @abstractmethod
    def start(self) -> Executor:
        """Start the worker processes.

        Raises:
            PlacementError: the pools do not fit into the cluster.
            ConfigError: there is no cluster at ``spec.address``.
        """

    def plan(self) -> ClusterPlan | None:
        """Return where the processes would be placed, without starting any; None if the backend does not place them.

        Raises:
            PlacementError: the pools never fit into the cluster, however many resources are free.
            ConfigError: there is no cluster at ``spec.address``.
        """
        return None


class LocalBackend(ExecutorBackend):
    """Engines in this process, or in every process that ``torchrun`` started; ``spec`` is not used."""

    def start(self) -> LocalExecutor:
        """Return the executor of this process (`process_executor`)."""
        return process_executor()


def resources_text(resources: Mapping[str, float]) -> str:
    """Return CPUs and GPUs as text, such as "2 CPU, 0.5 GPU"."""
    shown = [f"{resources[name]:g} {name}" for name in RESOURCES if resources.get(name)]
    return ", ".join(shown) or "nothing"
