"""Settings of rejection sampling: which completions are imitated."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, field_validator

from rlcore.algorithms.registries import advantages, sample_selectors
from rlcore.algorithms.selection import BestParams
from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore_recipes.settings.algorithm import AlgorithmSettings
from rlcore_recipes.settings.roles import MOST_COMPLETIONS
from rlcore_recipes.settings.sections import RLSections

ANSWER = "ground_truth"
DEFAULT_HINT = "\n\nHint: the answer is {ground_truth}. Explain how to get there, as if you did not know it."


class SelectionSettings(Config):
    """Which completions are imitated. Those whose reward failed never are."""

    selector: Annotated[Algorithm, AlgorithmField(sample_selectors)] = Field(  # type: ignore[assignment]  # a name is enough
        "best", description="Sample selector: the weight of each completion; 0 leaves it out."
    )
    max_per_prompt: int | None = Field(
        None, ge=1, description="Completions to keep of a prompt, at most: those with the highest scores; null: all."
    )
    deduplicate: bool = Field(True, description="Keep one of the equal completions of a prompt.")
    keep_truncated: bool = Field(
        False,
        description="Also imitate completions that reached data.max_response_length. They have no end token, so the "
        "model learns to go on.",
    )
    save: bool = Field(True, description="Write the kept completions to out_dir/selected, as data for the recipe sft.")


class RationalizationSettings(Config):
    """Second attempts, with the answer in the prompt, at prompts of which nothing was kept."""

    hint: str = Field(
        DEFAULT_HINT,
        description="Text after the prompt's last message; {ground_truth} is replaced by the reference answer. The "
        "trained prompt is without it.",
    )
    n: int | None = Field(
        None, ge=1, le=MOST_COMPLETIONS, description="Completions of a prompt with a hint; null: rollout.n."
    )

    @field_validator("hint")
    @classmethod
    def _names_the_answer(cls, hint: str) -> str:
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(hint) if name is not None}
        except ValueError as error:
            raise ValueError(f"is not a format string ({error}); write {{{{ and }}}} for braces") from None
        if found != {ANSWER}:
            raise ValueError(
                f"must contain {{{ANSWER}}} and no other field, and has {', '.join(sorted(found)) or 'none'}; write "
                "{{ and }} for braces"
            )
        return hint


class RaftAlgorithmSettings(AlgorithmSettings):
    """Selection, and what happens between the rewards and the update."""

    advantage: Annotated[Algorithm, AlgorithmField(advantages)] = Field(  # type: ignore[assignment]  # a name is enough
        "sample_weight", description="Advantage estimator; sample_weight gives every token its sample's weight."
    )
    selection: SelectionSettings = Field(
        default_factory=SelectionSettings, description="Which completions are imitated."
    )
    rationalization: RationalizationSettings | None = Field(
        None, description="Second attempts with a hint, where nothing was kept; null is off."
    )
    restart: bool = Field(
        False,
        description="Train from the run's first weights, with a new optimizer and schedule, in every step (STaR). The "
        "policy of the step before only generates.",
    )


def selection_problems(config: RLSections, algorithm: RaftAlgorithmSettings) -> Iterator[tuple[str, str]]:
    """Yield the key and the reason of what cannot work in the recipe raft, or would do nothing there."""
    params, n, loss = algorithm.selection.selector.params, config.rollout.n, config.actor.objective.policy_loss
    if isinstance(params, BestParams) and params.k >= n and params.min_score == -math.inf:
        yield (
            "algorithm.selection.selector",
            f"keeps the best {params.k} of rollout.n={n} completions, which is all of them: raise rollout.n, or set "
            "min_score",
        )
    if "imitates" in algorithm.advantage.entry.traits and algorithm.kl_in_reward is not None:
        yield (
            "algorithm.kl_in_reward",
            f"changes nothing, as {algorithm.advantage.name} gives no credit to rewards: set it to null, and hold the "
            "policy to the reference with actor.objective.kl_loss",
        )
    if loss.entry.together is not None:
        yield (
            "actor.objective.policy_loss",
            f"{loss.name} compares the samples of a {loss.entry.together}, and selection leaves some of them out",
        )
    compares = _comparisons_with_the_sampler(config)
    if algorithm.restart and compares:
        yield "algorithm.restart", f"trains another policy than the one that sampled, with which {compares} compares it"
    if algorithm.rationalization is not None:
        yield from _rationalization_problems(config, compares)


def _comparisons_with_the_sampler(config: RLSections) -> str:
    """Return the key of what compares the policy with the one that sampled; "" if nothing does."""
    actor = config.actor
    if "importance_ratio" in actor.objective.policy_loss.entry.traits:
        return f"actor.objective.policy_loss={actor.objective.policy_loss.name}"
    if actor.objective.correction is not None:
        return "actor.objective.correction"
    return "actor.old_logprobs=rollout" if actor.old_logprobs == "rollout" else ""


def _rationalization_problems(config: RLSections, compares: str) -> Iterator[tuple[str, str]]:
    key = "algorithm.rationalization"
    if compares:
        yield key, f"trains on a prompt without the hint that the sampler had, and {compares} compares the two"
    if config.asynchronous.max_staleness > 0:
        yield key, "generates within the step, when the rollout of an asynchronous run is busy; set it to null"
    if config.data.ground_truth_key is None:
        yield key, "puts the reference answer into the prompt, and data.ground_truth_key is null"
