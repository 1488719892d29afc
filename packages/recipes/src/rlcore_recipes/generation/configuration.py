"""The configuration of generation, from keys and from the run that the model comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from warnings import warn

from rlcore.cli import recipes
from rlcore.config import load_config
from rlcore.errors import RlcoreWarning
from rlcore_recipes.export.source import Choice
from rlcore_recipes.generation.candidates import Candidate, find_candidates
from rlcore_recipes.generation.from_run import check_served, model_keys, run_of, url_keys, values_of_run
from rlcore_recipes.settings.generation import FROM_RUN, GenerationConfig

OPTIONS = {
    "n": "rollout.validation.n",
    "temperature": "rollout.validation.temperature",
    "max_tokens": "data.max_response_length",
    "system": "data.system_prompt",
}
"""Keys that commands have as options."""


def generation_config(
    source: str, choice: Choice, overrides: Sequence[str], urls: Sequence[str], options: Mapping[str, Any]
) -> tuple[GenerationConfig, Candidate]:
    """Find the model, and load the configuration.

    Args:
        options: values of `OPTIONS` by name; None leaves the key to the run, or to its default.

    Raises:
        RlcoreError: there is no such model, or the configuration is not valid.
    """
    (candidate,) = candidates = find_candidates([source], choice)
    run = run_of(candidates)
    base = {} if run is None else values_of_run(run.config, GenerationConfig)
    if run is not None:
        base["data"] = {key: value for key, value in base["data"].items() if key in FROM_RUN}
        if base["rollout"].pop("environment", None) is not None:
            message = "the run's rollout.environment takes no part: the model answers without tools and environment"
            warn(message, RlcoreWarning, stacklevel=1)
    given = [f"{OPTIONS[name]}={value}" for name, value in options.items() if value is not None]
    words = [*model_keys(candidates), *url_keys(urls), *given, *overrides]
    config = load_config(GenerationConfig, None, words, base)
    check_served(config.rollout, candidates)
    recipes.check_packages(config)
    return config, candidate
