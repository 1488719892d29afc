"""GRPO: advantages relative to the other completions of the same prompt (Shao et al., 2024, arXiv:2402.03300).

With other estimators and losses from the registry also Dr. GRPO, RLOO, REINFORCE++, ReMax, GSPO and others: all that
needs no critic.
"""

from __future__ import annotations

from rlcore.cli import run_recipe_module
from rlcore_recipes.batch_metrics import batch_metrics
from rlcore_recipes.collect import generate_and_score
from rlcore_recipes.credit import with_advantages
from rlcore_recipes.forward import with_old_logprobs, with_ref_logprobs
from rlcore_recipes.session import Session, open_session, train_rl
from rlcore_recipes.settings import RLConfig
from rlcore_recipes.updates import sync_policy, update_actor


class GRPOConfig(RLConfig):
    """One run of GRPO."""


def run(config: GRPOConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    with open_session(config) as session:
        train_rl(session, "grpo", step)


def step(session: Session[GRPOConfig], number: int) -> dict[str, float]:
    """Generate, score, compare within groups, update."""
    config, roles, timed = session.config, session.roles, session.timed
    batch = generate_and_score(session, next(session.prompts))
    if config.needs_old_logprobs:
        with timed("old_log_prob"):
            batch = with_old_logprobs(roles.actor, batch, config)
    if roles.ref is not None:
        with timed("ref"):
            batch = with_ref_logprobs(roles.ref, batch, config)
    with timed("adv"):
        batch, metrics = with_advantages(batch, config.algorithm, session.kl, config.data.max_response_length)
    with timed("update_actor"):
        metrics.update(update_actor(roles.actor, batch, config))
    with timed("update_weights"):
        sync_policy(roles, config, version=number)
    return batch_metrics(batch) | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("grpo")
