"""`gymnasium`: ``reset(seed=…) -> (observation, info)``, ``step(action) -> (observation, reward, terminated, truncated,
info)``, with text as observations and actions. No class of the package gymnasium is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample
from rlcore_agents.conversation import Reply
from rlcore_agents.environment import Environment, Step
from rlcore_agents.environment.checks import short
from rlcore_agents.environment.exchange import EnvironmentFailure
from rlcore_agents.environment.loading import load_callable
from rlcore_agents.environment.shipped import opening, seed_of, shipped_runner
from rlcore_agents.gymnasium.settings import GymnasiumSettings


class GymnasiumEnvironment(Environment):
    """One episode of a gymnasium-like environment; every reward is that of its turn.

    Args:
        env: as `GymnasiumSettings.env`.
        kwargs: its keyword arguments.
    """

    def __init__(self, env: str, kwargs: Mapping[str, Any]) -> None:
        self._name = env.rpartition(":")[2]
        self._env = load_callable(env, "environment")(**kwargs)

    def reset(self, sample: PromptSample, seed: int) -> list[dict[str, Any]]:
        """Begin an episode with the seed of the row, and its further fields as ``options`` if ``reset`` takes them."""
        given: dict[str, Any] = {"seed": seed_of(sample)}
        if "options" in inspect.signature(self._env.reset).parameters:
            given["options"] = dict(sample.extra)
        observation, _ = self._parts(self._env.reset(**given), "reset", "(observation, info)")
        return opening(sample, self._text(observation, "reset"))

    def step(self, reply: Reply) -> Step:
        """Give the text of the reply, without its reasoning, to the environment."""
        form = "(observation, reward, terminated, truncated, info)"
        observation, reward, terminated, truncated, info = self._parts(self._env.step(reply.text), "step", form)
        done = bool(terminated or truncated)
        numbers = {str(key): value for key, value in dict(info or {}).items() if isinstance(value, int | float | str)}
        return Step(None if done else self._text(observation, "step"), reward, done, info=numbers)

    def close(self) -> None:
        """Close the environment if it can be closed."""
        if callable(getattr(self._env, "close", None)):
            self._env.close()

    def _parts(self, value: Any, method: str, form: str) -> tuple[Any, ...]:
        if not isinstance(value, tuple) or len(value) != form.count(",") + 1:
            raise EnvironmentFailure(f"{self._name}.{method} returned {short(value)}, not {form}")
        return value

    def _text(self, observation: Any, method: str) -> str:
        if not isinstance(observation, str):
            raise EnvironmentFailure(f"{self._name}.{method} returned the observation {short(observation)}, not text")
        return observation


def gymnasium_environment(spec: EpisodeSpec) -> EpisodeRunner:
    """Return what runs episodes of `gymnasium`.

    Raises:
        ConfigError: the environment cannot be imported or called.
    """
    options = spec.options
    assert isinstance(options, GymnasiumSettings)
    load_callable(options.env, "environment")
    path = "rlcore_agents.gymnasium.environment:GymnasiumEnvironment"
    return shipped_runner(spec, options, path, env=options.env, kwargs=options.kwargs)
