"""Self-play: a small model that moves at random learns Nim from games against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_it_wins_more_games_and_makes_fewer_illegal_moves(
    learns: Callable[..., Any], metrics_of: Callable[[Path], list[dict[str, float]]], tmp_path: Path
) -> None:
    result = learns("self_play-nim")
    assert result.score > result.values[0] + 0.1
    illegal = [line["reward/illegal"] for line in metrics_of(tmp_path / "self_play-nim-0") if "reward/illegal" in line]
    assert sum(illegal[-5:]) < 0.5 * sum(illegal[:5])
