"""`RayBackend`: the plugin ``ray`` of the group ``rlcore.executors``.

Ray is imported when an executor is started or a cluster is asked: ``rlcore plan`` does neither without an address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlcore.controller.backend import ClusterPlan, ExecutorBackend

if TYPE_CHECKING:
    from rlcore_ray.executor import RayExecutor


class RayBackend(ExecutorBackend):
    """Engines in Ray actors, on the cluster at ``spec.address`` or one that is started on this machine."""

    def start(self) -> RayExecutor:
        from rlcore_ray.executor import RayExecutor

        spec = self.spec
        return RayExecutor(
            spec.pools,
            spec.placement,
            address=spec.address,
            logs=spec.logs,
            placement_timeout_s=spec.placement_timeout_s,
            call_timeout_s=spec.call_timeout_s,
        )

    def plan(self) -> ClusterPlan | None:
        """Return where the processes would be placed now; None if Ray would be started on this machine for the run."""
        if self.spec.address is None:
            return None
        from rlcore_ray import capacity, cluster

        pools = self.spec.pools
        connected = cluster.connect(self.spec.address, pools)
        try:
            nodes = capacity.nodes()
            capacity.check_fits(pools)
            assigned = capacity.assign(pools, nodes)
            if assigned is not None:
                return ClusterPlan(nodes, assigned)
            problem = "too few resources are free now; a run would wait for them"
            return ClusterPlan(nodes, {}, capacity.unplaceable(pools, problem))
        finally:
            if connected:
                cluster.disconnect()
