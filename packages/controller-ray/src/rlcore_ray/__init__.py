"""The Ray executor: engines in worker processes, on one machine or many. Needs ``pip install 'rlcore[ray]'``."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Ray reads these when it is imported: workers use this environment, and no usage statistics are sent.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A raylet ends itself if its agents do not register in time, and a busy machine needs more than the default 30 s.
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")

if TYPE_CHECKING:
    from rlcore_ray.executor import RayExecutor
    from rlcore_ray.remote_batch import RemoteBatch

_HOMES = {"RayExecutor": "executor", "RemoteBatch": "remote_batch"}

__all__ = ["RayExecutor", "RemoteBatch"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rlcore_ray' has no attribute {name!r}")
