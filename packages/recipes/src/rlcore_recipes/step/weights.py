"""The policy's weights, from the trainer into the rollout engine."""

from __future__ import annotations

from typing import Any

from rlcore.metrics import Metrics
from rlcore_recipes.run.session import Session


def sync_weights(session: Session[Any], version: int) -> Metrics:
    """Make the rollout engine generate with the actor's weights and call them ``version``; return what travelled.

    The actor is offloaded to host memory afterwards if so configured. Metrics are under ``weight_sync/``; there are
    none if the engines share the weights.
    """
    roles, offload = session.roles, session.config.actor.offload
    with session.timed("update_weights"):
        metrics = session.executor.sync_weights(roles.actor, roles.rollout, version, session.config.weight_sync)
        session.version = version  # afterwards: every rollout process must be as far when it is read
        if offload and roles.rollout.shares_weights:
            roles.actor.offload("optimizer")
        elif offload:
            roles.actor.offload()
    return metrics.prefixed("weight_sync/")
