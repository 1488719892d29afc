"""Episodes that are games: the policy against itself in training, against a programmed opponent in validation.

A game is one trajectory. Moves that the policy sampled are sampled segments, and everything else (states, moves of a
programmed opponent) is not trained on. In self-play the policy makes the moves of both players, in one conversation;
as games are open, neither player sees more than the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from typing import Literal

from rlcore.config import Algorithm
from rlcore.engines import GenerationRequest, ModelSettings, RolloutEngine, SamplingParams
from rlcore.engines.episode import PromptSample, Segment, Trajectory, sampled_segment
from rlcore.engines.rollout import FinishReason
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.games.dialogue import chooser, dialogue_of
from rlcore_recipes.games.game import PerfectPlay
from rlcore_recipes.run.seeds import sample_seed

Opponent = Literal["optimal", "random"]


@dataclass(frozen=True)
class Table:
    """What every game of a run shares.

    Attributes:
        sampling: of a move; ``max_tokens`` bounds the whole game, after its prompt.
        move_tokens: maximum tokens of a move.
    """

    game: Algorithm
    model: ModelSettings
    data: DataSettings
    sampling: SamplingParams
    move_tokens: int


@dataclass(frozen=True)
class Outcome:
    """How a game ended. Rewards find its fields in ``extra["outcome"]``.

    Attributes:
        first_score: of the first player: 0 lost, 0.5 drawn or unfinished, 1 won.
        turns: moves made, an illegal one included.
        illegal: it ended because a move was not one of the legal ones, or none could be read; its player lost.
        unfinished: there was no room for a further move (``data.max_response_length``).
        score: of the policy's side; of the first player in self-play.
    """

    first_score: float
    turns: int
    illegal: bool = False
    unfinished: bool = False
    score: float = 0.5


async def self_play(engine: RolloutEngine, sample: PromptSample, seed: int, *, table: Table) -> Trajectory:
    """Let the policy play both sides; the score is the first player's."""
    return await _play(engine, sample, seed, table, sides=(0, 1), opponent=None)


async def against(
    engine: RolloutEngine, sample: PromptSample, seed: int, *, table: Table, opponent: Opponent
) -> Trajectory:
    """Let the policy play one side; the score is the policy's.

    It is the side that perfect play would win from there, so that 1 can be reached against any opponent; where perfect
    play draws, the seed chooses.
    """
    value = _perfect(table.game).value(sample.extra["state"])
    side = seed % 2 if value == 0.5 else int(value < 0.5)
    return await _play(engine, sample, seed, table, sides=(side,), opponent=opponent)


async def _play(
    engine: RolloutEngine,
    sample: PromptSample,
    seed: int,
    table: Table,
    sides: tuple[int, ...],
    opponent: Opponent | None,
) -> Trajectory:
    """Play one game from the state of ``sample``; the policy makes the moves of ``sides``."""
    perfect, dialogue, choices = _perfect(table.game), dialogue_of(table.model, table.data), chooser(seed)
    game, state, segments = perfect.game, str(sample.extra["state"]), [Segment(sample.prompt_tokens)]
    limit, turn = len(sample.prompt_tokens) + table.sampling.max_tokens, 0
    reason: FinishReason = "stop"
    while True:
        if turn % 2 in sides:
            completion = await engine.generate(_request(sample, seed, turn, segments, limit, table))
            segments.append(sampled_segment(completion, table.sampling.logprobs))
            reason = completion.finish_reason
            move = dialogue.move(completion.tokens) if reason == "stop" else None
        else:
            move = choices.choice(perfect.best_moves(state) if opponent == "optimal" else list(game.moves(state)))
            segments.append(Segment(dialogue.answer(move)))
        if move is None or move not in game.moves(state):
            outcome = Outcome(float(turn % 2), turn + 1, illegal=True)
            break
        state, turn = game.play(state, move), turn + 1
        if not game.moves(state):
            result = game.result(state)
            outcome = Outcome(result if turn % 2 == 0 else 1 - result, turn)
            break
        following = dialogue.turn(segments[-1].tokens, game.describe(state))
        if _length(segments) + len(following) >= limit:
            outcome, reason = Outcome(0.5, turn, unfinished=True), "length"
            break
        segments.append(Segment(following))
    score = outcome.first_score if 0 in sides else 1 - outcome.first_score
    return Trajectory(tuple(segments), reason, {"outcome": asdict(replace(outcome, score=score))})


def _request(
    sample: PromptSample, seed: int, turn: int, segments: Sequence[Segment], limit: int, table: Table
) -> GenerationRequest:
    """Return the request for the move of ``turn``, after all tokens so far."""
    tokens = list(chain.from_iterable(segment.tokens for segment in segments))
    sampling = replace(
        table.sampling,
        max_tokens=min(table.move_tokens, limit - len(tokens)),
        seed=sample_seed(seed, "move", sample.position, turn),
    )
    return GenerationRequest(tokens, sampling, f"{sample.position}-{seed}-{turn}")


def _length(segments: Sequence[Segment]) -> int:
    return sum(len(segment.tokens) for segment in segments)


@cache
def _perfect(choice: Algorithm) -> PerfectPlay:
    """Return the game of ``choice`` with the values of the states searched so far; a process makes it once."""
    return PerfectPlay(choice())
