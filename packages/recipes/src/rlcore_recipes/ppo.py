"""PPO: advantages from a critic that is trained with the policy (Schulman et al., 2017, arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from rlcore.cli import run_recipe_module
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings import AlgorithmSettings, CriticSettings, RLConfig, RolloutSettings
from rlcore_recipes.settings.reinforcement import indivisible
from rlcore_recipes.step import (
    add_advantages,
    add_logprobs,
    add_scores,
    add_values,
    rollouts,
    step_metrics,
    sync_weights,
    update_critic,
    update_policy,
    validate_completions,
)


class PPOConfig(RLConfig):
    """One run of PPO."""

    critic: CriticSettings = Field(default_factory=CriticSettings, description="The value model.")
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=1), description="Generation.")
    algorithm: AlgorithmSettings = Field(
        default_factory=lambda: AlgorithmSettings(advantage="gae"), description="Advantages and reward shaping."
    )

    @property
    def critic_role(self) -> CriticSettings | None:
        needed = "values" in self.algorithm.advantage.entry.required_columns
        return self.critic if (needed if self.critic.enable is None else self.critic.enable) else None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what cannot work."""
        yield from super().problems()
        if self.has_critic:
            if self.critic.mini_batch_size is not None:
                yield from indivisible(
                    self.data.train_batch_size, "critic.mini_batch_size", self.critic.mini_batch_size
                )
            if "values" not in self.algorithm.advantage.entry.required_columns:
                name = self.algorithm.advantage.name
                yield "critic.enable", f"is true, but the advantage estimator {name} gives a critic nothing to learn"


@restarting
def run(config: PPOConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("ppo", config, step, validate_completions)


def step(session: Session[PPOConfig], number: int) -> dict[str, float]:
    """Generate, score, estimate advantages with the critic, update the critic and the policy."""
    samples = rollouts(session, number)  # over Ray they are being scored
    batch = add_logprobs(session, samples.batch)
    batch = add_values(session, batch)  # of the critic
    batch = add_scores(session, batch, samples)  # waits for the rewards
    batch, metrics = add_advantages(session, batch)
    metrics |= update_critic(session, batch)
    if session.roles.critic is None or number >= session.config.critic.warmup_steps:
        metrics |= update_policy(session, batch)
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("ppo")
