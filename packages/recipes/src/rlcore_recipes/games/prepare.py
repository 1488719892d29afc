"""``rlcore data games``: the states from which games begin."""

from __future__ import annotations

import random
from typing import Annotated

from pydantic import Field

from rlcore.config import Algorithm, AlgorithmField, Config
from rlcore_recipes.data.prepare.rows import Splits, prompt_row
from rlcore_recipes.games.game import Game, PerfectPlay, games


class GamesOptions(Config):
    """Options of ``rlcore data games``."""

    game: Annotated[Algorithm, AlgorithmField(games)] = Field(  # type: ignore[assignment]
        "nim", description="Game: nim, tic_tac_toe, one of your package, or {name: nim, stones: 20}."
    )
    train: int = Field(256, ge=1, description="Rows to train on; every first state occurs equally often.")
    seed: int = Field(0, ge=0, description="The same seed makes the same rows.")


def prepare_games(options: GamesOptions) -> Splits:
    """First states of a two-player text game, for the recipe self_play; with a legal move as response, for SFT."""
    game: Game = options.game()
    perfect, rng, starts = PerfectPlay(game), random.Random(f"games {options.seed}"), list(game.starts())
    chosen = [start for _ in range(-(-options.train // len(starts))) for start in rng.sample(starts, len(starts))]

    def row(state: str, split: str, index: int) -> dict[str, object]:
        question = f"{game.rules}\n{game.describe(state)}"
        move = rng.choice(list(game.moves(state)))
        value = str(perfect.value(state))
        return prompt_row(
            question, value, options.game.name, response=f"[{move}]", state=state, split=split, index=index
        )

    return {
        "train": [row(state, "train", index) for index, state in enumerate(chosen[: options.train])],
        "test": [row(state, "test", index) for index, state in enumerate(starts)],
    }
