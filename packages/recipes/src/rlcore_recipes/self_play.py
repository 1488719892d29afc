"""Self-play: the policy plays both sides of a two-player text game (SPIRAL, Liu et al., 2025, arXiv:2506.24119).

A step is that of GRPO. What differs is the episode, a game of several turns, and the advantage, which each player's
tokens get from that player's score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from rlcore.batch import Batch
from rlcore.cli import run_recipe_module
from rlcore.config import Algorithm, AlgorithmField
from rlcore.engines import SamplingParams
from rlcore.engines.episode import PromptSample
from rlcore_recipes.games.episode import Table, against, self_play
from rlcore_recipes.games.game import games
from rlcore_recipes.rollouts.episode import Episode
from rlcore_recipes.rollouts.plan import validation_plan
from rlcore_recipes.rollouts.synchronous import roll_out_together
from rlcore_recipes.run.open import train_rl
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.session import Session
from rlcore_recipes.run.trainable import Validation
from rlcore_recipes.settings import AlgorithmSettings, RewardRole, RLConfig
from rlcore_recipes.step import (
    add_advantages,
    add_logprobs,
    add_scores,
    rollouts,
    step_metrics,
    sync_weights,
    update_policy,
)
from rlcore_recipes.step.validation import validate_prompts


class SelfPlayConfig(RLConfig):
    """One run of self-play; ``data`` has the states from which games begin (``rlcore data games``)."""

    game: Annotated[Algorithm, AlgorithmField(games)] = Field(  # type: ignore[assignment]
        "nim", description="The game."
    )
    move_tokens: int = Field(
        16, ge=1, description="Maximum tokens of a move; data.max_response_length is for the game."
    )
    opponent: Literal["optimal", "random"] = Field(
        "optimal", description="Opponent in validation: perfect play, or a random legal move."
    )
    reward: RewardRole = Field(default_factory=lambda: RewardRole(name="game"), description="Reward of games.")
    algorithm: AlgorithmSettings = Field(
        default_factory=lambda: AlgorithmSettings(advantage="role_conditioned"),
        description="Advantages and reward shaping.",
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what cannot work."""
        yield from super().problems()
        if self.move_tokens > self.data.max_response_length:
            limit = self.data.max_response_length
            yield (
                "move_tokens",
                f"{self.move_tokens} does not fit into data.max_response_length={limit}, that of a game",
            )
        if self.algorithm.kl_in_reward is not None and self.algorithm.advantage.name == "role_conditioned":
            yield "algorithm.kl_in_reward", "is not read by role_conditioned: use actor.objective.kl_loss"

    def table(self, sampling: SamplingParams) -> Table:
        """Return what games share."""
        return Table(self.game, self.model, self.data, sampling, self.move_tokens)

    def training_episode(self, sampling: SamplingParams) -> Episode:
        """Return a game of the policy against itself."""
        return partial(self_play, table=self.table(sampling))


@restarting
def run(config: SelfPlayConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_rl("self_play", config, step, validate_games)


def step(session: Session[SelfPlayConfig], number: int) -> dict[str, float]:
    """Play, score, compare the games from the same state for each player, update."""
    samples = rollouts(session, number)  # rollout.n games from each state
    batch = add_logprobs(session, samples.batch)
    batch = add_scores(session, batch, samples)
    batch, metrics = add_advantages(session, batch)
    metrics |= update_policy(session, batch)
    metrics |= sync_weights(session, version=number)
    return step_metrics(session, batch, number) | samples.metrics | metrics.to_dict()


def validate_games(session: Session[SelfPlayConfig]) -> Validation:
    """Validate on games against ``opponent`` from the held-out states, each on the side that can win."""
    plan = validation_plan(session.config, session.stop_tokens)
    sampling: SamplingParams = plan.episode.keywords["sampling"]  # type: ignore[attr-defined]
    table, opponent = session.config.table(sampling), session.config.opponent
    plan = replace(plan, episode=partial(against, table=table, opponent=opponent))

    def played(prompts: Sequence[PromptSample]) -> Batch:
        samples = roll_out_together(session.workers, plan, prompts)
        return add_scores(session, samples.batch, samples)

    return validate_prompts(session, played)


if __name__ == "__main__":
    run_recipe_module("self_play")
