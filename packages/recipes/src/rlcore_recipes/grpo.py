"""GRPO: advantages relative to the other completions of the same prompt (Shao et al., 2024, arXiv:2402.03300).

With other estimators and losses from the registry also Dr. GRPO, RLOO, REINFORCE++, ReMax, GSPO and others: all that
needs no critic.
"""

from __future__ import annotations

from rlcore.cli import run_recipe_module
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings import RLConfig
from rlcore_recipes.step import (
    add_advantages,
    add_logprobs,
    add_scores,
    rollouts,
    step_metrics,
    sync_weights,
    update_policy,
    validate_completions,
)


class GRPOConfig(RLConfig):
    """One run of GRPO."""


@restarting
def run(config: GRPOConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("grpo", config, step, validate_completions)


def step(session: Session[GRPOConfig], number: int) -> dict[str, float]:
    """Generate, score, compare within groups, update."""
    samples = rollouts(session, number)  # rollout.n completions of each prompt; over Ray they are being scored
    batch = add_logprobs(session, samples.batch)  # old and reference log-probs, as the objective needs them
    batch = add_scores(session, batch, samples)  # waits for the rewards
    batch, metrics = add_advantages(session, batch)  # relative to the other completions of the prompt
    metrics |= update_policy(session, batch)
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("grpo")
