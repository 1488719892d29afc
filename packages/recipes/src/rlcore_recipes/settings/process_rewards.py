"""Settings of PRIME: process rewards and filtering of prompts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlcore.algorithms.registries import advantages
from rlcore.config import Algorithm, AlgorithmField
from rlcore_recipes.settings.algorithm import AlgorithmSettings, DynamicSamplingSettings


class PRIMEAlgorithmSettings(AlgorithmSettings):
    """Advantages, reward shaping and filtering of prompts."""

    advantage: Annotated[Algorithm, AlgorithmField(advantages)] = Field(  # type: ignore[assignment]  # a name is enough
        "prime", description="Advantage estimator."
    )
    dynamic_sampling: DynamicSamplingSettings | None = Field(
        default_factory=lambda: DynamicSamplingSettings(
            filter={"name": "mean-score", "low": 0.2, "high": 0.8},
            max_generations=4,
        ),
        description="Dynamic sampling of prompts of which some completions are right and some wrong; null is off.",
    )
