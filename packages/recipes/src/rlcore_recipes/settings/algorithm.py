"""Settings of what happens between the rewards and the update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlcore.algorithms.kl import KLPenaltySettings
from rlcore.algorithms.registries import advantages, sampling_filters
from rlcore.algorithms.shaping import OverlongSettings
from rlcore.config import Algorithm, AlgorithmField, Config


class DynamicSamplingSettings(Config):
    """Groups that teach nothing are dropped, and further prompts generated for until the batch is full."""

    filter: Annotated[Algorithm, AlgorithmField(sampling_filters)] = Field(  # type: ignore[assignment]  # a name is enough
        "nonzero-spread", description="Sampling filter: the groups to keep."
    )
    max_generations: int = Field(
        10, ge=1, description="Maximum rounds of generation for a step; then dropped groups fill what is missing."
    )


class AlgorithmSettings(Config):
    """Advantages and reward shaping."""

    advantage: Annotated[Algorithm, AlgorithmField(advantages)] = Field(  # type: ignore[assignment]  # a name is enough
        "grpo", description="Advantage estimator."
    )
    credit: Literal["trajectory", "turn", "branch"] = Field(
        "trajectory",
        description="What the advantage estimator compares in episodes of an environment: trajectories, by all rewards "
        "of each; their turns, by what each and later ones earned; or their branches, by the rewards on each.",
    )
    turn_discount: float = Field(
        1.0, ge=0, le=1, description="With credit=turn: discount of the rewards of later turns, per turn."
    )
    shared_tokens: Literal["once", "every_row"] = Field(
        "once",
        description="Where an episode branches, train the tokens that branches share once, or in the row of every "
        "branch.",
    )
    kl_in_reward: KLPenaltySettings | None = Field(
        None, description="KL penalty on the token rewards; null is off. With a target, β adapts to reach it."
    )
    overlong: OverlongSettings | None = Field(
        None, description="Penalty on completions close to data.max_response_length; null is off."
    )
