"""The recipe: GRPO's step with one more column, which the loss reads."""

from typing import ClassVar

from pydantic import Field

from my_task.algorithms import group_mean
from rlcore.algorithms.objectives import PolicyObjectiveSettings
from rlcore_recipes import step as steps
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings import ActorSettings, AlgorithmSettings, RLConfig


def default_actor() -> ActorSettings:
    """Return the policy's settings with the package's loss."""
    return ActorSettings(objective=PolicyObjectiveSettings(policy_loss="focal"))


class HardPromptsConfig(RLConfig):
    """GRPO's configuration with other defaults and one more key."""

    own_columns: ClassVar[frozenset[str]] = frozenset({"solve_rate"})
    solved_from: float = Field(1.0, description="Score from which an answer counts as right.")
    actor: ActorSettings = Field(default_factory=default_actor, description="The policy under training.")
    algorithm: AlgorithmSettings = Field(
        default_factory=lambda: AlgorithmSettings(advantage="mean_deviation"), description="Advantages and shaping."
    )


@restarting
def run(config: HardPromptsConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("hard_prompts", config, step, steps.validate_completions)


def step(session: Session[HardPromptsConfig], number: int) -> dict[str, float]:
    """Generate, score, see which prompts are hard, update."""
    samples = steps.rollouts(session, number)
    batch = steps.add_logprobs(session, samples.batch)
    batch = steps.add_scores(session, batch, samples)
    right = (batch["score"] >= session.config.solved_from).float()
    batch = batch.with_columns(solve_rate=group_mean(right, batch["group"]).float())  # the part that GRPO does not have
    batch, metrics = steps.add_advantages(session, batch)
    metrics.mean("my_task/solve_rate", float(right.mean()))
    metrics |= steps.update_policy(session, batch)
    metrics |= steps.sync_weights(session, version=number)
    return steps.step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()
