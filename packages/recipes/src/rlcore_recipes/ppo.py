"""PPO: advantages from a critic that learns beside the policy (Schulman et al., 2017, arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from rlcore.cli import run_recipe_module
from rlcore_recipes.batch_metrics import batch_metrics
from rlcore_recipes.collect import training_batch
from rlcore_recipes.credit import with_advantages
from rlcore_recipes.forward import judged
from rlcore_recipes.restarts import restarting
from rlcore_recipes.session import Session, open_session, train_rl, validate_completions
from rlcore_recipes.settings import AlgorithmSettings, CriticSettings, RLConfig, RolloutSettings
from rlcore_recipes.settings.reinforcement import indivisible
from rlcore_recipes.updates import sync_policy, update_actor, update_critic


class PPOConfig(RLConfig):
    """One run of PPO."""

    critic: CriticSettings = Field(default_factory=CriticSettings, description="The value model.")
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=1), description="Generation.")
    algorithm: AlgorithmSettings = Field(
        default_factory=lambda: AlgorithmSettings(advantage="gae"), description="Advantages and reward shaping."
    )

    @property
    def has_critic(self) -> bool:
        needed = "values" in self.algorithm.advantage.entry.needs
        return needed if self.critic.enable is None else self.critic.enable

    @property
    def critic_sizes(self) -> tuple[int, int]:
        return self.critic.mini_batch_size or self.mini_batch_size, self.critic.epochs or self.actor.epochs

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.has_critic:
            if self.critic.mini_batch_size is not None:
                yield from indivisible(
                    self.data.train_batch_size, "critic.mini_batch_size", self.critic.mini_batch_size
                )
            if "values" not in self.algorithm.advantage.entry.needs:
                name = self.algorithm.advantage.name
                yield "critic.enable", f"is true, but the advantage estimator {name} gives a critic nothing to learn"


@restarting
def run(config: PPOConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    with open_session(
        config, critic=config.critic if config.has_critic else None, validate=validate_completions
    ) as session:
        train_rl(session, "ppo", step)


def step(session: Session[PPOConfig], number: int) -> dict[str, float]:
    """Generate, score, estimate advantages with the critic, update the critic and the policy."""
    config, roles, timed = session.config, session.roles, session.timed
    batch, sampled = training_batch(session, number, judged)
    with timed("adv"):
        batch, metrics = with_advantages(session, batch)
    if roles.critic is not None:
        with timed("update_critic"):
            metrics.update(update_critic(roles.critic, batch, config.critic, config))
    if roles.critic is None or number >= config.critic.warmup_steps:
        with timed("update_actor"):
            metrics.update(update_actor(session, batch))
    with timed("update_weights"):
        metrics.update(sync_policy(session, version=number))
    return session.executor.compute(batch_metrics, batch, number - 1) | sampled | metrics.to_dict()


if __name__ == "__main__":
    run_recipe_module("ppo")
