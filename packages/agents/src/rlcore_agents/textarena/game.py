"""A game of TextArena 0.7.4 that has its random numbers to itself."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from threading import Lock
from typing import Any

import numpy as np
import textarena as ta
from textarena.envs.registration import ENV_REGISTRY

from rlcore.boundary import reason
from rlcore.errors import ConfigError

MOST_PLAYERS = 16
_GLOBAL_RANDOM = Lock()


class WrongPlayers(ConfigError):
    """The game does not begin with so many players."""


class Game:
    """One game. Players see what is new to them, as `turn` returns it.

    TextArena draws from the global random numbers of Python and NumPy, also while a game is played. Every game here has
    its own, which replace the global ones for the time of a call: games that are played at the same time do not depend
    on each other.

    Args:
        game: id; its observation wrappers, which show all earlier messages again, are left out.
        kwargs: arguments of the game.

    Raises:
        ConfigError: there is no such game, it cannot be made, or (`WrongPlayers`) not played with so many players.
    """

    def __init__(self, game: str, kwargs: Mapping[str, Any], players: int, seed: int) -> None:
        self.players = players
        source = random.Random(seed)
        self._random = source.getstate()
        self._numpy = np.random.RandomState(seed % 2**32).get_state()
        with self._own_random():
            self._env, self._actions = _made(game, kwargs)
            try:
                self._env.reset(num_players=players, seed=seed)
            except Exception as error:
                raise WrongPlayers(
                    f"the game {game} cannot be played with players={players}: {reason(error)}"
                ) from error

    @property
    def rewards(self) -> dict[int, float]:
        """Rewards by player, after the end."""
        return {player: float(reward) for player, reward in (self._env.state.rewards or {}).items()}

    @property
    def reason(self) -> str:
        """Why the game ended."""
        return str(next((info["reason"] for info in self._env.state.game_info.values() if info.get("reason")), ""))

    def invalid(self, player: int) -> bool:
        """Return whether an invalid action of ``player`` ended the game for them."""
        return bool(self._env.state.game_info[player].get("invalid_move"))

    def turn(self) -> tuple[int, str]:
        """Return whose turn it is, and what is new to that player."""
        with self._own_random():
            player, messages = self._env.get_observation()
        names = self._env.state.role_mapping
        lines = [
            text if sender == ta.GAME_ID else f"[{names.get(sender, f'Player {sender}')}] {text}"
            for sender, text, kind in messages
            if (sender, kind) != (player, ta.ObservationType.PLAYER_ACTION)
        ]
        return int(player), "\n\n".join(lines).strip() or "It is your turn."

    def act(self, action: str) -> bool:
        """Take an action of the player whose turn it is; return whether the game has ended."""
        for wrapper in self._actions:
            action = wrapper.action(action)
        with self._own_random():
            done, _ = self._env.step(action)
        return bool(done)

    def accepts(self, action: str) -> bool:
        """Return whether ``action`` would be valid; nothing happens."""
        trial = copy.copy(self)
        trial._env = copy.deepcopy(self._env)
        state = trial._env.state
        player, errors = state.current_player_id, state.error_count
        trial.act(action)
        return state.error_count <= errors and not state.game_info[player].get("invalid_move")

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        with _GLOBAL_RANDOM:
            before, numpy_before = random.getstate(), np.random.get_state()
            random.setstate(self._random)
            np.random.set_state(self._numpy)
            try:
                yield
            finally:
                self._random, self._numpy = random.getstate(), np.random.get_state()
                random.setstate(before)
                np.random.set_state(numpy_before)


def _made(game: str, kwargs: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Return the bare game, and the wrappers that change actions, the outermost first."""
    if game not in ENV_REGISTRY:
        close = get_close_matches(game, [name for name in ENV_REGISTRY if not name.endswith(("-raw", "-train"))], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; textarena.pprint_registry_detailed() lists them"
        raise ConfigError(f"TextArena has no game {game!r}{hint}")
    try:
        env = ta.make(game, **kwargs)
    except LookupError as error:  # NLTK's message is a page
        raise ConfigError(
            f"the game {game} needs word lists of NLTK, which are not installed; run: "
            "python -m nltk.downloader words averaged_perceptron_tagger_eng"
        ) from error
    except Exception as error:
        raise ConfigError(f"the game {game} of TextArena cannot be made: {reason(error)}") from error
    actions = []
    while isinstance(env, ta.Wrapper):
        if isinstance(env, ta.ActionWrapper):
            actions.append(env)
        env = env.env
    return env, actions


def fewest_players(game: str, kwargs: Mapping[str, Any]) -> int:
    """Return how many players a game needs.

    Raises:
        ConfigError: there is no such game, or it cannot begin.
    """
    problem = WrongPlayers(f"the game {game} takes no number of players up to {MOST_PLAYERS}")
    for players in range(1, MOST_PLAYERS + 1):
        try:
            begun = Game(game, kwargs, players, seed=0)
        except WrongPlayers as error:
            problem = error
            continue
        if players > 1 or not isinstance(begun._env.state, ta.TwoPlayerState):  # some of these begin with one
            return players
    raise problem
