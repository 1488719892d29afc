"""The configuration of preference optimisation on the policy's own completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlcore.algorithms.preferences import PreferenceObjectiveSettings
from rlcore.algorithms.registries import pair_builders
from rlcore.algorithms.shaping import OverlongSettings
from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore_recipes.settings.reinforcement import RLConfig
from rlcore_recipes.settings.roles import PolicySettings

PROVIDED = frozenset({"ref_answer_logprob", "margin", "pair"})
"""Columns of a batch of pairs that a loss may declare."""


class PairPolicySettings(PolicySettings):
    """The policy under training."""

    objective: PreferenceObjectiveSettings = Field(default_factory=PreferenceObjectiveSettings, description="Loss.")


class PairAlgorithmSettings(Config):
    """How completions become pairs."""

    kl_in_reward: ClassVar[None] = None
    shared_tokens: ClassVar[Literal["every_row"]] = "every_row"  # a row is compared as a whole

    pairs: Annotated[Algorithm, AlgorithmField(pair_builders)] = Field(  # type: ignore[assignment]  # a name is enough
        "best-worst", description="Pair builder: which completions of a prompt are compared."
    )
    overlong: OverlongSettings | None = Field(
        None, description="Penalty on completions close to data.max_response_length; null is off."
    )


class OnlinePreferenceConfig(RLConfig):
    """One run of preference optimisation on the policy's own completions."""

    actor: PairPolicySettings = Field(  # type: ignore[assignment]  # the objective is another one
        default_factory=PairPolicySettings, description="The policy under training."
    )
    algorithm: PairAlgorithmSettings = Field(  # type: ignore[assignment]  # there are no advantages
        default_factory=PairAlgorithmSettings, description="Pairs."
    )

    @property
    def needs_ref(self) -> bool:
        return "ref_answer_logprob" in self.actor.objective.loss.entry.required_columns

    @property
    def needs_old_logprobs(self) -> bool:
        return False

    @property
    def needs_entropy(self) -> bool:
        return False

    @property
    def needed_columns(self) -> frozenset[str]:
        return frozenset()

    @property
    def rollout_logprobs_read_by(self) -> list[str]:
        return []

    def algorithm_problems(self) -> Iterator[tuple[str, str]]:
        """Yield why the loss cannot learn from the pairs of the run."""
        loss = self.actor.objective.loss
        if loss.entry.together is None:
            yield "actor.objective.loss", f"{loss.name} learns from single answers, and this recipe makes pairs"
        elif missing := sorted(loss.entry.required_columns - PROVIDED):
            yield "actor.objective.loss", f"{loss.name} needs the column {missing[0]}, which pairs of completions lack"
        if self.rollout.n < 2:
            yield "rollout.n", "is 1, and completions of a prompt are compared: set it to 2 or more"
        if self.ref.model is not None and not self.needs_ref:
            yield "ref.model", f"would never be loaded: the loss {loss.name} has no reference policy"

    def doubts(self) -> Iterator[tuple[str, str]]:
        """Yield nothing: what contradicts itself here is refused."""
        yield from ()
