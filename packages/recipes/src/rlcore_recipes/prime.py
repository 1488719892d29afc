"""PRIME: process rewards of a model that learns them from outcomes, online (Cui et al., 2025, arXiv:2502.01456)."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from rlcore.cli import run_recipe_module
from rlcore.metrics import Metrics
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings import DynamicSamplingSettings, RLConfig
from rlcore_recipes.settings.process_rewards import PRIMEAlgorithmSettings
from rlcore_recipes.settings.reinforcement import indivisible
from rlcore_recipes.settings.roles import PRMSettings
from rlcore_recipes.step import (
    add_advantages,
    add_logprobs,
    add_process_rewards,
    add_scores,
    rollouts,
    step_metrics,
    sync_weights,
    update_policy,
    update_prm,
    validate_completions,
)


class PRIMEConfig(RLConfig):
    """One run of PRIME."""

    own_columns = frozenset({"process_rewards"})

    prm: PRMSettings = Field(default_factory=PRMSettings, description="The process reward model.")
    algorithm: PRIMEAlgorithmSettings = Field(
        default_factory=PRIMEAlgorithmSettings, description="Advantages, reward shaping and filtering of prompts."
    )

    @property
    def dynamic_sampling(self) -> DynamicSamplingSettings | None:
        return self.algorithm.dynamic_sampling

    @property
    def prm_role(self) -> PRMSettings | None:
        return self.prm

    @property
    def needs_ref(self) -> bool:
        return True  # process rewards are relative to it

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what cannot work."""
        yield from super().problems()
        if self.prm.mini_batch_size is not None:
            yield from indivisible(self.data.train_batch_size, "prm.mini_batch_size", self.prm.mini_batch_size)
        advantage = self.algorithm.advantage
        if "process_rewards" not in advantage.entry.required_columns:
            yield "algorithm.advantage", f"{advantage.name} reads no process rewards, which prm learns: take prime"


@restarting
def run(config: PRIMEConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("prime", config, step, validate_completions)


def step(session: Session[PRIMEConfig], number: int) -> dict[str, float]:
    """Generate, score, teach the process reward model the outcomes, reward tokens with it, update the policy."""
    samples = rollouts(session, number)  # of prompts that are neither solved nor hopeless: algorithm.dynamic_sampling
    batch = add_logprobs(session, samples.batch)  # those of the reference among them
    batch = add_scores(session, batch, samples)
    metrics = Metrics()
    if session.config.prm.update == "before":
        metrics |= update_prm(session, batch)
    batch, found = add_process_rewards(session, batch)
    metrics |= found
    if session.config.prm.update == "after":
        metrics |= update_prm(session, batch)
    batch, found = add_advantages(session, batch)  # process rewards and scores, relative to the prompt's others
    metrics |= found
    metrics |= update_policy(session, batch)
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("prime")
