"""What models think of sampled tokens: log-probs under the policies, values under the critic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlcore.batch import Batch
from rlcore.engines import ForwardRequest, TrainEngine
from rlcore_recipes.settings import CriticSettings, RLConfig

if TYPE_CHECKING:
    from rlcore_recipes.session import Session


def judged(session: Session[Any], batch: Batch) -> Batch:
    """Add ``old_logprobs``, ``ref_logprobs`` and ``values``, as far as the run needs them.

    Where the models run in other processes, this only asks for them: those on different pools work at the same time.
    """
    config, roles, timed = session.config, session.roles, session.timed
    if config.needs_old_logprobs:
        with timed("old_log_prob"):
            batch = with_old_logprobs(roles.actor, batch, config)
    if roles.ref is not None:
        with timed("ref"):
            batch = with_ref_logprobs(roles.ref, batch, config)
    if roles.critic is not None:
        with timed("values"):
            batch = with_values(roles.critic, batch, config.critic)
    return batch


def with_old_logprobs(actor: TrainEngine, batch: Batch, config: RLConfig) -> Batch:
    """Add per-token ``old_logprobs``: those of the policy before the update, or as the rollout engine reported them."""
    if config.actor.old_logprobs == "rollout":
        return batch.with_columns(old_logprobs=batch["rollout_logprobs"])
    return _with_logprobs(actor, batch, "old_logprobs", config.rollout.temperature)


def with_ref_logprobs(ref: TrainEngine, batch: Batch, config: RLConfig) -> Batch:
    """Add per-token ``ref_logprobs``: those of the reference policy."""
    batch = _with_logprobs(ref, batch, "ref_logprobs", config.rollout.temperature)
    if config.ref.offload:
        ref.offload()
    return batch


def with_values(critic: TrainEngine, batch: Batch, settings: CriticSettings) -> Batch:
    """Add per-token ``values``: the critic's value of the state before each token."""
    output = critic.forward(batch.select("tokens", "loss_mask"), ForwardRequest(("values",)))
    if settings.offload:
        critic.offload()
    return batch.with_columns(values=output["values"])


def _with_logprobs(engine: TrainEngine, batch: Batch, column: str, temperature: float) -> Batch:
    output = engine.forward(batch.select("tokens", "loss_mask"), ForwardRequest(("logprobs",), temperature))
    return batch.with_columns(**{column: output["logprobs"]})
