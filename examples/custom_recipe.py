"""A custom recipe: GRPO with the length reward of Kimi k1.5 (Kimi Team, 2025, arXiv:2501.12599, section 2.3.3).

As a script:

    python custom_recipe.py tiny.yaml reward.name=gsm8k length_coeff=0.2

In a package, its entry point makes it `rlcore run concise`:

    [project.entry-points."rlcore.recipes"]
    concise = "my_package.plugin:concise"
"""

import sys
from pathlib import Path

import torch
from pydantic import Field

from rlcore.batch import Batch
from rlcore.config import load_config
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


class ConciseConfig(RLConfig):
    """One run of GRPO with a length reward."""

    length_coeff: float = Field(0.5, ge=0, description="Weight of the length reward; 0: none.")


@restarting
def run(config: ConciseConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("concise", config, step, validate_completions)


def step(session: Session[ConciseConfig], number: int) -> dict[str, float]:
    """Generate, score, prefer short answers, compare within groups, update."""
    samples = rollouts(session, number)
    batch = add_logprobs(session, samples.batch)
    batch = add_scores(session, batch, samples)
    shorter = length_reward(batch)  # the part that GRPO does not have
    batch = batch.with_columns(score=batch["score"] + session.config.length_coeff * shorter)
    batch, metrics = add_advantages(session, batch)
    metrics.mean("reward/length", float(shorter.mean()))
    metrics |= update_policy(session, batch)
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()


def length_reward(batch: Batch) -> torch.Tensor:
    """Return λ = ½ − (length − min) / (max − min) over the group for right answers, min(0, λ) for wrong ones, `[B]`.

    A group whose answers have one length gets 0. An answer is right if its score is positive. The columns are dense, so
    the controller has them, even if the tokens are in other processes.
    """
    length, (_, index) = batch["response_length"].float(), batch["group"].unique(return_inverse=True)
    shortest = length.new_zeros(len(length)).scatter_reduce(0, index, length, "amin", include_self=False)[index]
    longest = length.new_zeros(len(length)).scatter_reduce(0, index, length, "amax", include_self=False)[index]
    lambda_ = torch.where(longest > shortest, 0.5 - (length - shortest) / (longest - shortest).clamp(min=1), 0)
    return torch.where(batch["score"] > 0, lambda_, lambda_.clamp(max=0))


if __name__ == "__main__":
    run(load_config(ConciseConfig, Path(sys.argv[1]), sys.argv[2:]))
