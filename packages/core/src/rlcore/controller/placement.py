"""Placement: which role runs in which pool of processes. Plain configuration, read without Ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Literal

from pydantic import Field

from rlcore.config import Config

DEFAULT_POOL = "default"
CPU_POOL = "cpu"
"""Pool of rewards and of the controller's work on tokens, unless they are placed on another pool."""
CPU_ROLES = ("reward", "compute")
REPLACEABLE = ("rollout", *CPU_ROLES)
"""Roles whose engines can be rebuilt in the middle of a run."""


class ResourcePool(Config):
    """Worker processes with equal resources. Roles on one pool share its processes."""

    processes: int = Field(1, ge=1, le=2**16, description="Worker processes.")
    cpus_per_process: float = Field(
        1.0, ge=0, le=2**16, description="CPU cores of each process (fractions share a core)."
    )
    gpus_per_process: float = Field(
        0.0, ge=0, le=2**10, description="GPUs of each process; pools with fractions (0.5) may share one GPU."
    )
    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] = Field(
        "pack", description="Processes on few nodes or on many; the strict ones fail where that is impossible."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.gpus_per_process > 1 and not self.gpus_per_process.is_integer():
            yield "gpus_per_process", f"{self.gpus_per_process:g} is neither a whole number nor a fraction of one GPU"


def replaceable(roles: Iterable[str]) -> bool:
    """Return whether each process of a pool with these roles is an independent replica, which is replaced if it dies.

    The processes of other pools form one world of ``torch.distributed``; if one dies, all are lost.
    """
    return all(role in REPLACEABLE for role in roles)


def pools_of(pools: Mapping[str, ResourcePool], placement: Mapping[str, str], roles: Iterable[str]) -> dict[str, str]:
    """Return the pool of every role: as in ``placement``, else `CPU_POOL` for `CPU_ROLES`, `DEFAULT_POOL` for models.

    If ``pools`` has a single pool in addition to `CPU_POOL`, models go there, whatever its name is.

    Raises:
        ValueError: a role is placed on an unknown pool; the message names it and the known ones (`unknown_pool`).
    """
    own = [name for name in pools if name != CPU_POOL]
    found = {}
    for role in roles:
        default = CPU_POOL if role in CPU_ROLES else own[0] if len(own) == 1 else DEFAULT_POOL
        name = placement.get(role, default)
        problem = unknown_pool(name, pools)
        if problem is not None:
            raise ValueError(f"{role} cannot be placed: {problem}")
        found[role] = name
    return found


def complete(pools: Mapping[str, ResourcePool], used: Iterable[str]) -> dict[str, ResourcePool]:
    """Return the pools in ``used``; `DEFAULT_POOL` and `CPU_POOL` get default settings if ``pools`` lacks them."""
    return {name: pools[name] if name in pools else ResourcePool() for name in dict.fromkeys(used)}


def unknown_pool(name: str, pools: Iterable[str]) -> str | None:
    """Return why a role cannot be placed on the pool ``name``; None if there is such a pool."""
    known = list(dict.fromkeys([*pools, DEFAULT_POOL, CPU_POOL]))
    if name in known:
        return None
    close = get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"there is no pool {name!r}{hint}; the pools are {', '.join(pools) or 'none'}"
