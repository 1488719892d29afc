"""GRPO: advantages relative to the other completions of the same prompt (Shao et al., 2024, arXiv:2402.03300).

With other estimators and losses from the registry also Dr. GRPO, RLOO, REINFORCE++, ReMax, GSPO and others: all that
needs no critic.
"""

from __future__ import annotations

from rlcore.cli import run_recipe_module
from rlcore_recipes.batch_metrics import batch_metrics
from rlcore_recipes.collect import training_batch
from rlcore_recipes.credit import with_advantages
from rlcore_recipes.forward import judged
from rlcore_recipes.restarts import restarting
from rlcore_recipes.session import Session, open_session, train_rl, validate_completions
from rlcore_recipes.settings import RLConfig
from rlcore_recipes.updates import sync_policy, update_actor


class GRPOConfig(RLConfig):
    """One run of GRPO."""


@restarting
def run(config: GRPOConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    with open_session(config, validate=validate_completions) as session:
        train_rl(session, "grpo", step)


def step(session: Session[GRPOConfig], number: int) -> dict[str, float]:
    """Generate, score, compare within groups, update."""
    timed = session.timed
    batch, sampled = training_batch(session, number, judged)
    with timed("adv"):
        batch, metrics = with_advantages(session, batch)
    with timed("update_actor"):
        metrics.update(update_actor(session, batch))
    with timed("update_weights"):
        metrics.update(sync_policy(session, version=number))
    return session.executor.compute(batch_metrics, batch, number - 1) | sampled | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("grpo")
