"""Forward passes over sampled tokens: log-probs under the policies, values under the critic."""

from __future__ import annotations

from typing import Any

from rlcore.batch import Batch
from rlcore.engines import ForwardRequest, TrainEngine
from rlcore.engines.train import Output
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings import RLConfig
from rlcore_recipes.step.reference import reference_logprobs


def add_logprobs(session: Session[Any], batch: Batch) -> Batch:
    """Add per-token ``old_logprobs``, ``entropy`` and ``ref_logprobs``: those that the run needs.

    Where the models run in other processes, this only requests them: models on different pools work at the same time.
    """
    config, roles, timed = session.config, session.roles, session.timed
    if config.needs_old_logprobs or config.needs_entropy:
        with timed("old_log_prob"):
            batch = with_old_logprobs(roles.actor, batch, config)
    if config.needs_ref:
        with timed("ref"):
            found = reference_logprobs(
                roles.actor, roles.ref, batch, temperature=config.rollout.temperature, offload=config.ref.offload
            )
            batch = batch.with_columns(ref_logprobs=found)
    return batch


def add_values(session: Session[Any], batch: Batch) -> Batch:
    """Add per-token ``values``: the critic's value of the state before each token. Nothing without a critic."""
    critic, settings = session.roles.critic, session.config.critic_role
    if critic is None or settings is None:
        return batch
    with session.timed("values"):
        output = critic.forward(batch.select("tokens", "loss_mask"), ForwardRequest(("values",)))
        if settings.offload:
            critic.offload()
    return batch.with_columns(values=output["values"])


def with_old_logprobs(actor: TrainEngine, batch: Batch, config: RLConfig) -> Batch:
    """Add per-token ``old_logprobs``, those of the policy before the update, or as the rollout engine reported them;
    and the policy's ``entropy``, if the run needs it."""
    outputs: tuple[Output, ...] = ("logprobs",)
    if config.actor.old_logprobs == "rollout":
        batch, outputs = batch.with_columns(old_logprobs=batch["rollout_logprobs"]), ()
    if config.needs_entropy:
        outputs += ("entropy",)
    return _with_outputs(actor, batch, config, outputs, logprobs="old_logprobs") if outputs else batch


def _with_outputs(
    engine: TrainEngine, batch: Batch, config: RLConfig, outputs: tuple[Output, ...], logprobs: str
) -> Batch:
    """Add ``outputs`` of ``engine``; its log-probs under the name ``logprobs``."""
    request = ForwardRequest(outputs, config.rollout.temperature)
    found = engine.forward(batch.select("tokens", "loss_mask"), request)
    names = {name: logprobs if name == "logprobs" else str(name) for name in outputs}
    return batch.with_columns(**{names[name]: found[name] for name in outputs})
