"""Games of TextArena: opponents, self-play, invalid actions, and games at the same time."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlcore import plugins
from rlcore.engines import ModelSettings, RolloutEngine, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec, PromptSample, Trajectory
from rlcore.errors import ConfigError
from rlcore_agents.textarena.game import Game, fewest_players
from rlcore_agents.textarena.settings import TextArenaSettings

LIMITS = EpisodeLimits(max_turns=20, max_tokens=12_000, max_model_len=16_000, timeout_s=60.0)

Play = Callable[..., Trajectory]


@pytest.fixture
def play(policy: Path, scripted: Callable[[Callable[[str], str]], RolloutEngine]) -> Play:
    """Play a game with a policy that answers a prompt by a function."""

    def run(
        answer: Callable[[str], str], sample: int = 3, seed: int = 0, limits: EpisodeLimits = LIMITS, **options: Any
    ) -> Trajectory:
        sampling = SamplingParams(max_tokens=32, logprobs=True)
        spec = EpisodeSpec(ModelSettings(path=str(policy)), TextArenaSettings(**options), sampling, limits)
        runner = plugins.get("rlcore.environments", "textarena").build(spec)
        prompt = PromptSample([5], [{"role": "user", "content": "-"}], extra={"seed": sample})
        try:
            return asyncio.run(runner.run(scripted(answer), prompt, seed))  # type: ignore[no-any-return]
        finally:
            runner.close()

    return run


def bisect(prompt: str) -> str:
    """Guess a number between the hints."""
    low, high = 1, 20
    for number, word in re.findall(r"\[(\d+)\]<\|end\|><\|user\|>.*?(higher|lower)", prompt, re.DOTALL):
        low, high = (max(low, int(number) + 1), high) if word == "higher" else (low, min(high, int(number) - 1))
    return f"I say [{(low + high) // 2}]"


def first_free(prompt: str) -> str:
    """Play the first free cell of tic-tac-toe."""
    return re.findall(r"\[\d\]", prompt.rpartition("<|user|>")[2].rpartition("Available Moves:")[2])[0]


def test_a_game_for_one_player_is_won(play: Play) -> None:
    trajectory = play(bisect, game="GuessTheNumber-v0")
    assert (trajectory.score, trajectory.invalid) == (1.0, "")
    assert trajectory.rows() == [tuple(range(len(trajectory.segments)))]
    assert trajectory.metrics["env/unfinished"] == trajectory.metrics["env/invalid_action"] == 0
    again = play(bisect, game="GuessTheNumber-v0", seed=7)
    assert again.segments == trajectory.segments, "samples of a group begin the same game"
    others = [play(bisect, game="GuessTheNumber-v0", sample=sample).segments for sample in range(4)]
    assert any(other != trajectory.segments for other in others)


def test_what_the_policy_said_is_not_shown_again(play: Play) -> None:
    shown = [m["content"] for m in play(bisect, game="GuessTheNumber-v0").messages if m["role"] == "user"]
    assert not any("I say" in text for text in shown)
    assert len(shown) > 1


def test_random_opponents_play_valid_actions(play: Play) -> None:
    scores = set()
    for seed in range(6):
        trajectory = play(first_free, seed=seed, game="TicTacToe-v0", opponent="random", player=0)
        assert not trajectory.invalid
        assert trajectory.metrics["env/invalid_action"] == 0
        scores.add(trajectory.score)
    assert 1.0 in scores
    assert play(first_free, seed=1, game="TicTacToe-v0", opponent="random").segments != trajectory.segments


def test_an_opponent_of_the_user(play: Play, tmp_path: Path) -> None:
    file = tmp_path / "opponents.py"
    file.write_text("import re\ndef last(seen, rng):\n    return re.findall(r'\\[\\d\\]', seen)[-1]\n")
    trajectory = play(first_free, game="TicTacToe-v0", player=1, opponent=f"{file}:last")
    # it took 8, 7 and 6, a row
    assert (trajectory.score, trajectory.metrics["turns"]) == (-1.0, 2)
    assert "[Player 0] [8]" in trajectory.messages[0]["content"]


def test_self_play_rewards_the_last_turn_of_every_player(play: Play) -> None:
    trajectory = play(first_free, game="TicTacToe-v0")
    rows = trajectory.rows()
    assert len(rows) == 2, "every player has a conversation"
    rewards = [[trajectory.segments[i].reward for i in row if trajectory.segments[i].sampled] for row in rows]
    assert sorted(row[-1] or 0.0 for row in rewards) == [-1.0, 1.0]
    assert all(reward is None for row in rewards for reward in row[:-1])
    assert trajectory.info["player_0"] == -trajectory.info["player_1"]


def test_invalid_actions_are_answered_and_then_lose(play: Play) -> None:
    trajectory = play(lambda prompt: "[99]", game="TicTacToe-v0", opponent="random", player=0)
    assert "invalid move" in trajectory.messages[-2]["content"]
    assert trajectory.score == -1.0
    assert (trajectory.metrics["env/invalid_action"], trajectory.metrics["turns"]) == (1, 2)
    assert not trajectory.invalid


def test_a_game_that_a_limit_ends_is_lost(play: Play) -> None:
    short = EpisodeLimits(max_turns=2, max_tokens=12_000, max_model_len=16_000, timeout_s=60.0)
    trajectory = play(lambda prompt: "[1]", game="GuessTheNumber-v0", limits=short)
    assert (trajectory.score, trajectory.info["unfinished"], trajectory.finish_reason) == (-1.0, True, "length")


def moves(game: Game, count: int) -> list[str]:
    """Return what players see when they roll and hold in turns."""
    seen = []
    for number in range(count):
        seen.append(game.turn()[1])
        game.act("[roll]" if number % 3 else "[hold]")
    return seen


def test_games_at_the_same_time_do_not_share_random_numbers() -> None:
    alone = [moves(Game("PigDice-v0", {}, 2, seed), 12) for seed in (1, 2)]
    assert alone[0] != alone[1]
    state = random.getstate()
    both = [Game("PigDice-v0", {}, 2, seed) for seed in (1, 2)]
    together: list[list[str]] = [[], []]
    for number in range(12):
        for game, seen in zip(both, together, strict=True):
            seen.append(game.turn()[1])
            game.act("[roll]" if number % 3 else "[hold]")
    assert together == alone
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("game", "players"),
    [("GuessTheNumber-v0", 1), ("TicTacToe-v0", 2), ("QuantumTicTacToe-v0", 2), ("ThreePlayerTicTacToe-v0", 3)],
)
def test_the_fewest_players_of_a_game(game: str, players: int) -> None:
    assert fewest_players(game, {}) == players


def test_several_opponents(play: Play) -> None:
    trajectory = play(first_cell, game="ThreePlayerTicTacToe-v0", opponent="random", player=1)
    assert not trajectory.invalid
    assert trajectory.metrics["turns"] >= 1


def first_cell(prompt: str) -> str:
    taken = len(re.findall(r"\[\d+ \d+\]", prompt))
    return f"[{taken % 5} {taken % 4}]"


def test_mistakes(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in [
        ({"game": "TicTacTo-v0"}, "no game 'TicTacTo-v0'; did you mean TicTacToe-v0"),
        ({"game": "TicTacToe-v0", "players": 3}, "cannot be played with players=3"),
        ({"game": "TicTacToe-v0", "player": 2}, "player=2: the game TicTacToe-v0 has the players 0 to 1"),
        ({"game": "TicTacToe-v0", "opponent": "missing.py:f"}, "missing.py does not exist"),
        ({"game": "TicTacToe-v0", "kwargs": {"size": 4}}, "unexpected keyword argument 'size'"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            play(first_free, **options)
    monkeypatch.setattr("nltk.download", lambda *names, **options: False)
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(ConfigError, match=r"needs word lists of NLTK.*python -m nltk.downloader words"):
        play(first_free, game="Hangman-v0")
    trajectory = play(first_free, game="TicTacToe-v0", player=0, opponent="random", actions=("[42]",))
    assert "random opponents have no valid action among 1 ([42])" in trajectory.invalid
