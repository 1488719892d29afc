"""What the environments of this package have in common: they run as those of users do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample
from rlcore_agents.environment.runner import python_environment
from rlcore_agents.environment.settings import EnvironmentSettings, PythonEnvironmentSettings


def shipped_runner(spec: EpisodeSpec, options: EnvironmentSettings, path: str, **kwargs: Any) -> EpisodeRunner:
    """Return what runs episodes of the environment at the import path ``path``.

    Args:
        options: settings of the environment, of which those of `EnvironmentSettings` hold.
        kwargs: arguments of the environment, of JSON values.
    """
    shared = {name: getattr(options, name) for name in EnvironmentSettings.model_fields}
    return python_environment(replace(spec, options=PythonEnvironmentSettings(path=path, kwargs=kwargs, **shared)))


def seed_of(sample: PromptSample) -> int:
    """Return the seed of the task that a sample is: the column ``seed`` of its row, else its position in the run.

    Episodes of one group have the same task. What an environment draws while it plays may come from the episode's seed.
    """
    seed = sample.extra.get("seed")
    return seed if isinstance(seed, int) else sample.position


def opening(sample: PromptSample, text: str) -> list[dict[str, Any]]:
    """Return the first messages of an episode: the system messages of the sample, and ``text`` of the user."""
    system = [dict(message) for message in sample.messages if message.get("role") == "system"]
    return [*system, {"role": "user", "content": text}]
