"""The Ray executor: engines in worker processes, on one machine or many. Needs ``pip install 'rlcore[ray]'``."""

import os

# read when ray is imported: workers use this very environment, and nothing is reported anywhere
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# a raylet ends itself if its agents are not up in time, which a machine that is busy needs more of than the default
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")

from rlcore_ray.executor import RayExecutor
from rlcore_ray.remote_batch import RemoteBatch

__all__ = ["RayExecutor", "RemoteBatch"]
