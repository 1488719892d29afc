"""`textarena`: one episode is one game."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample
from rlcore.errors import ConfigError
from rlcore_agents.conversation import Reply
from rlcore_agents.environment import Chat, EpisodeTruncated
from rlcore_agents.environment.checks import short
from rlcore_agents.environment.exchange import EnvironmentFailure
from rlcore_agents.environment.loading import load_callable
from rlcore_agents.environment.shipped import opening, seed_of, shipped_runner
from rlcore_agents.textarena.settings import TextArenaSettings
from rlcore_agents.tools.thread import in_thread

BRACKETS = re.compile(r"\[[^\[\]\n]{1,40}\]")

Opponent = Callable[[str, random.Random], str]


async def play(
    chat: Chat,
    sample: PromptSample,
    *,
    game: str,
    kwargs: Mapping[str, Any],
    players: int,
    player: int | None,
    opponent: str,
    actions: Sequence[str],
    unfinished_score: float,
) -> float | None:
    """Play a game; arguments as in `TextArenaSettings`.

    The samples of a group begin the same game, by its seed (`seed_of`).

    Returns:
        the policy's reward; None if it plays all players, whose last turns have the players' rewards then.
    """
    from rlcore_agents.textarena.game import Game

    seed = seed_of(sample)
    table = await in_thread(partial(Game, game, kwargs, players, seed))
    seat = random.Random(f"seat {seed}").randrange(players) if player is None else player
    everyone = opponent == "self" and players > 1
    others = None if everyone or players == 1 else _opponent(opponent, actions, table)
    conversations = [opening(sample, "")[:-1] for _ in range(players)]
    seen, last = [""] * players, dict[int, Reply]()
    rng, done, finished = random.Random(f"opponents {chat.seed}"), False, True
    while not done and finished:
        turn, news = await in_thread(table.turn)
        if others is None or turn == seat:
            conversations[turn] += chat.shortened([{"role": "user", "content": news}])
            try:
                last[turn] = await chat.complete(conversations[turn])
            except EpisodeTruncated:
                finished = False
                continue
            conversations[turn].append(last[turn].message)
            action = last[turn].text
        else:
            seen[turn] = f"{seen[turn]}\n\n{news}".strip()
            action = await in_thread(partial(others, seen[turn], rng))
        done = await in_thread(partial(table.act, action))
    trained = list(last) if everyone else [seat]
    rewards = table.rewards if finished else dict.fromkeys(trained, unfinished_score)
    chat.info["unfinished"] = not finished
    chat.info["invalid_action"] = any(map(table.invalid, trained))
    if finished:
        chat.info["end"] = table.reason
    if not everyone:
        return rewards.get(seat, 0.0)
    for place, reply in last.items():
        chat.info[f"player_{place}"] = rewards.get(place, 0.0)
        chat.reward(rewards.get(place, 0.0), reply)
    return None


def _opponent(opponent: str, actions: Sequence[str], table: Any) -> Opponent:
    if opponent != "random":
        return _user_opponent(opponent)

    def valid_action(seen: str, rng: random.Random) -> str:
        choices = list(actions or dict.fromkeys(BRACKETS.findall(seen)))
        for action in rng.sample(choices, len(choices)):
            if table.accepts(action):
                return str(action)
        raise EnvironmentFailure(
            f"random opponents have no valid action among {len(choices)} ({', '.join(choices[:10])}); "
            "list some in rollout.environment.textarena.actions"
        )

    return valid_action


def _user_opponent(path: str) -> Opponent:
    function = load_callable(path, "opponent")

    def action(seen: str, rng: random.Random) -> str:
        answer = function(seen, rng)
        if not isinstance(answer, str):
            raise EnvironmentFailure(f"opponent {path!r} returned {short(answer)}, not text")
        return answer

    return action


def textarena_environment(spec: EpisodeSpec) -> EpisodeRunner:
    """Return what plays a game of TextArena.

    Raises:
        ConfigError: there is no such game or opponent, or the game cannot be played like this.
    """
    from rlcore_agents.textarena.game import Game, fewest_players

    options = spec.options
    assert isinstance(options, TextArenaSettings)
    players = options.players or fewest_players(options.game, options.kwargs)
    Game(options.game, options.kwargs, players, seed=0)
    if options.player is not None and options.player >= players:
        raise ConfigError(f"player={options.player}: the game {options.game} has the players 0 to {players - 1}")
    if options.opponent not in ("self", "random"):
        _user_opponent(options.opponent)
    chosen = ("game", "kwargs", "player", "opponent", "unfinished_score")
    given = {name: getattr(options, name) for name in chosen}
    path = "rlcore_agents.textarena.play:play"
    return shipped_runner(spec, options, path, players=players, actions=list(options.actions), **given)
