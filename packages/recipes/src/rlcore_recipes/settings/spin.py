"""The configuration of self-play fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from rlcore.config import Config
from rlcore_recipes.settings.online_preference import OnlinePreferenceConfig
from rlcore_recipes.settings.roles import RewardRole, RolloutSettings


class SpinAlgorithmSettings(Config):
    """Demonstrations, and the opponent."""

    kl_in_reward: ClassVar[None] = None
    overlong: ClassVar[None] = None

    response_key: str = Field("response", description="Column of the demonstrations: text.")
    iteration_steps: int | None = Field(
        None,
        ge=1,
        description="Steps of an iteration, after which the policy becomes the reference of the next one; null: the "
        "reference stays the model of the start.",
    )


class SpinConfig(OnlinePreferenceConfig):
    """One run of self-play fine-tuning."""

    algorithm: SpinAlgorithmSettings = Field(  # type: ignore[assignment]  # pairs follow from the data
        default_factory=SpinAlgorithmSettings, description="Demonstrations and iterations."
    )
    rollout: RolloutSettings = Field(
        default_factory=lambda: RolloutSettings(n=2),
        description="Generation; of n completions of a prompt one is the demonstration.",
    )
    reward: RewardRole = Field(
        default_factory=lambda: RewardRole(name="none"), description="Measures completions; none measures nothing."
    )

    @property
    def needs_scores(self) -> bool:
        return False

    @property
    def response_key(self) -> str | None:
        return self.algorithm.response_key

    @property
    def given_first(self) -> bool:
        return True

    def algorithm_problems(self) -> Iterator[tuple[str, str]]:
        """Yield why the policy cannot learn from demonstrations and its own completions."""
        yield from super().algorithm_problems()
        if "margin" in self.actor.objective.loss.entry.required_columns:
            yield "actor.objective.loss", f"{self.actor.objective.loss.name} needs margins, which demonstrations lack"
        if self.algorithm.iteration_steps is not None and not self.builds_ref:
            why = (
                "the actor without its adapters is the reference"
                if self.needs_ref
                else f"the loss {self.actor.objective.loss.name} has none"
            )
            yield "algorithm.iteration_steps", f"renews the reference policy, and {why}; leave it out"
