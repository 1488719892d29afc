"""Games: perfect play, the tokens and outcomes of episodes, and the advantages of both players."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.algorithms.registries import advantages
from rlcore.batch import Batch, Jagged
from rlcore.config import Algorithm, load_config
from rlcore.engines import Completion, GenerationRequest, ModelSettings, SamplingParams
from rlcore.engines.episode import PromptSample
from rlcore.errors import ConfigError
from rlcore_kit.testing.algorithms import AdvantageConformance
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.games.dialogue import dialogue_of
from rlcore_recipes.games.episode import Table, against, self_play
from rlcore_recipes.games.game import Game, PerfectPlay, games
from rlcore_recipes.games.prepare import GamesOptions, prepare_games
from rlcore_recipes.games.turns import players
from rlcore_recipes.rollouts.trajectories import group_batch
from rlcore_recipes.self_play import SelfPlayConfig


def choice(name: str, **params: Any) -> Algorithm:
    entry = games.get(name)
    return Algorithm(entry, entry.params.model_validate(params))


@pytest.mark.parametrize(("most", "stones"), [(1, 9), (3, 25), (4, 23)])
def test_nim_is_lost_at_multiples_of_what_a_round_takes(most: int, stones: int) -> None:
    perfect = PerfectPlay(choice("nim", stones=stones, most=most)())
    for state in perfect.game.starts():
        rest = int(state) % (most + 1)
        assert perfect.value(state) == float(rest > 0)
        if rest:
            assert perfect.best_moves(state) == [str(rest)]


def test_tic_tac_toe_is_a_draw_that_random_play_never_wins() -> None:
    game: Game = choice("tic_tac_toe")()
    perfect, rng = PerfectPlay(game), random.Random(0)
    (start,) = game.starts()
    assert perfect.value(start) == 0.5
    assert len(perfect._values) == 5478  # the known number of positions
    for number in range(40):
        state, turn = start, number
        while game.moves(state):
            state = game.play(state, rng.choice(perfect.best_moves(state) if turn % 2 else list(game.moves(state))))
            turn += 1
        assert game.result(state) == 0.5 or turn % 2 == 0  # after the perfect player's move the other one is to move


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return ModelSettings(path=str(tiny_model(tmp_path_factory.mktemp("model"))))


class Scripted:
    """A rollout engine that answers with given tokens and keeps what it was asked."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers, self.asked = list(answers), list[GenerationRequest]()

    async def generate(self, request: GenerationRequest) -> Completion:
        self.asked.append(request)
        tokens = list(self.answers[len(self.asked) - 1])
        return Completion(tokens, [-0.5 * (1 + index) for index in range(len(tokens))], "stop")


def game_table(model: ModelSettings, room: int = 400, **nim: Any) -> Table:
    data = DataSettings(train_files=["x"], train_batch_size=1, max_prompt_length=64, max_response_length=room)
    return Table(choice("nim", **nim), model, data, SamplingParams(max_tokens=room), 8)


def played(model: ModelSettings, state: str, moves: Sequence[str], **options: Any) -> tuple[Any, Scripted, Any]:
    """Let the policy answer with ``moves``; return the trajectory, the engine and the dialogue."""
    table = game_table(model, **options)
    dialogue = dialogue_of(table.model, table.data)
    engine = Scripted([dialogue.answer(move) for move in moves])
    sample = PromptSample([7, 8, 9], [], extra={"state": state})
    return asyncio.run(self_play(engine, sample, 3, table=table)), engine, dialogue  # type: ignore[arg-type]


def outcome(trajectory: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = trajectory.info["outcome"]
    return found


def test_trained_tokens_are_exactly_the_sampled_ones(model: ModelSettings) -> None:
    trajectory, engine, dialogue = played(model, "7", ["3", "2", "2"])
    sample = PromptSample([7, 8, 9], [], extra={"state": "7"})
    batch = group_batch(sample, [trajectory])
    mask = batch.flat("loss_mask").bool()
    assert batch.flat("tokens")[mask].tolist() == [token for answer in engine.answers for token in answer]
    assert batch.flat("rollout_logprobs")[mask].tolist() == [
        -0.5 * (1 + i) for answer in engine.answers for i in range(len(answer))
    ]
    text = dialogue.renderer.tokenizer.decode(batch.flat("tokens")[3:].tolist())
    assert text == (
        "[3]<|end|><|user|>4 stones are left.<|end|><|assistant|>[2]<|end|>"
        "<|user|>2 stones are left.<|end|><|assistant|>[2]<|end|>"
    )
    # every request begins with all tokens of the game so far, and has a seed that no other has
    whole = batch.flat("tokens").tolist()
    assert all(list(request.prompt) == whole[: len(request.prompt)] for request in engine.asked)
    assert len({request.sampling.seed for request in engine.asked}) == 3
    assert batch["extra"][0]["outcome"] == outcome(trajectory)


@pytest.mark.parametrize(
    ("state", "moves", "first", "turns", "illegal"),
    [
        ("3", ["3"], 1.0, 1, False),
        ("7", ["3", "2", "2"], 1.0, 3, False),
        ("5", ["3", "2"], 0.0, 2, False),
        ("5", ["4"], 0.0, 1, True),
        ("5", ["3", "3"], 1.0, 2, True),
        ("5", ["3", "x] [2"], 0.0, 2, False),  # the last brackets count
        ("5", ["two"], 0.0, 1, True),
    ],
)
def test_outcomes(
    model: ModelSettings, state: str, moves: Sequence[str], first: float, turns: int, illegal: bool
) -> None:
    trajectory, *_ = played(model, state, moves)
    found = outcome(trajectory)
    assert (found["first_score"], found["score"], found["turns"]) == (first, first, turns)
    assert (found["illegal"], found["unfinished"]) == (illegal, False)


def test_a_game_without_room_is_unfinished_and_a_draw(model: ModelSettings) -> None:
    trajectory, *_ = played(model, "9", ["1"] * 9, room=60)
    assert outcome(trajectory)["unfinished"]
    assert (outcome(trajectory)["score"], trajectory.finish_reason) == (0.5, "length")
    assert sum(len(segment.tokens) for segment in trajectory.segments) <= 3 + 60


@pytest.mark.parametrize("state", ["7", "8"])
def test_the_opponent_plays_perfectly_and_is_not_trained_on(model: ModelSettings, state: str) -> None:
    """The policy has the side that can win: it wins with perfect moves, and loses after one mistake."""
    table = game_table(model)
    dialogue, perfect = dialogue_of(table.model, table.data), PerfectPlay(table.game())

    class Player(Scripted):
        def __init__(self, blunders: bool) -> None:
            super().__init__([])
            self.blunders = blunders

        async def generate(self, request: GenerationRequest) -> Completion:
            left = "7" if state == "7" and not self.asked else self.left(request)
            self.asked.append(request)
            best = perfect.best_moves(left)
            move = next((m for m in perfect.game.moves(left) if m not in best), best[0]) if self.blunders else best[0]
            return Completion(dialogue.answer(move), [], "stop")

        def left(self, request: GenerationRequest) -> str:
            text = dialogue.renderer.tokenizer.decode(list(request.prompt))
            return str(text.rpartition("<|user|>")[2].split()[0])

    for blunders, expected in [(False, 1.0), (True, 0.0)]:
        engine = Player(blunders)
        sample = PromptSample([7, 8, 9], [], extra={"state": state})
        trajectory = asyncio.run(against(engine, sample, 3, table=table, opponent="optimal"))  # type: ignore[arg-type]
        assert outcome(trajectory)["score"] == expected
        assert sum(segment.sampled for segment in trajectory.segments) == len(engine.asked) >= 1
        assert trajectory.segments[1].sampled == (state == "7")


def test_each_player_is_compared_with_the_same_player_of_the_group() -> None:
    """Against a loop over tokens: two groups, games of different lengths, rewards that other estimators read."""
    turns = [[2, 3], [2], [1, 1, 2], [3, 1]]
    scores, groups = [1.0, 0.0, 0.5, 1.0], [4, 9, 4, 9]
    mask, expected = [], []
    for row, lengths in enumerate(turns):
        mask += [0, 0]
        expected += [0.0, 0.0]
        mean = sum(s for s, g in zip(scores, groups) if g == groups[row]) / 2
        for turn, length in enumerate(lengths):
            own = scores[row] - mean if turn % 2 == 0 else (1 - scores[row]) - (1 - mean)
            mask += [1] * length + [0]
            expected += [own] * length + [0.0]
    sizes = torch.tensor([2 + sum(lengths) + len(lengths) for lengths in turns])
    batch = Batch(
        {
            "loss_mask": Jagged(torch.tensor(mask, dtype=torch.float32), sizes),
            "score": torch.tensor(scores),
            "group": torch.tensor(groups),
        }
    )
    entry = advantages.get("role_conditioned")
    assert Algorithm(entry, entry.params())(batch).advantages.tolist() == pytest.approx(expected)
    whose = players(batch)[torch.tensor(mask, dtype=torch.bool)].tolist()
    assert whose == [turn % 2 for lengths in turns for turn, length in enumerate(lengths) for _ in range(length)]


class TestRoleConditioned(AdvantageConformance):
    name = "role_conditioned"

    def batch(self, seed: int) -> Batch:
        return super().batch(seed).select("loss_mask", "tokens", "token_rewards", "group", "score")

    def test_equal_scores_give_no_advantage(self) -> None:
        batch = self.batch(0)
        same = batch.with_columns(score=torch.full((len(batch),), 0.3))
        assert float(self.estimate(same).advantages.abs().max()) == 0


def test_prepared_rows_have_legal_moves_and_the_value_of_perfect_play(tmp_path: Path) -> None:
    rows = prepare_games(GamesOptions(game={"name": "nim", "stones": 6}, train=20))  # type: ignore[arg-type]
    assert [row["extra_info"]["state"] for row in rows["test"]] == ["1", "2", "3", "4", "5", "6"]
    assert [row["ground_truth"] for row in rows["test"]] == ["1.0", "1.0", "1.0", "0.0", "1.0", "1.0"]
    assert len(rows["train"]) == 20
    for row in rows["train"]:
        left = int(row["extra_info"]["state"])
        assert 1 <= int(row["response"].strip("[]")) <= min(left, 3)
        assert row["prompt"][0]["content"].endswith(f"{left} stones are left.")


def test_keys_that_cannot_work_are_refused() -> None:
    needed = {
        "model.path": "m",
        "data.train_files": "a",
        "data.train_batch_size": 4,
        "data.max_prompt_length": 8,
        "data.max_response_length": 8,
        "rollout.n": 2,
        "trainer.out_dir": "r",
        "trainer.total_steps": 1,
    }
    given = [f"{key}={value}" for key, value in needed.items()]
    with pytest.raises(ConfigError) as refused:
        load_config(SelfPlayConfig, None, [*given, "algorithm.kl_in_reward={}"])
    assert "move_tokens: 16 does not fit into data.max_response_length=8" in str(refused.value)
    assert "algorithm.kl_in_reward: is not read by role_conditioned" in str(refused.value)
    with pytest.raises(ConfigError, match="unknown game 'nimm'; did you mean 'nim'"):
        load_config(SelfPlayConfig, None, [*given, "game=nimm"])
