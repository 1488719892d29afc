"""The configuration of an evaluation, from a file, from keys, or from the run that a model comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from warnings import warn

from rlcore.config import load_config
from rlcore.errors import ConfigError, RlcoreWarning
from rlcore_recipes.generation.candidates import Candidate
from rlcore_recipes.generation.from_run import check_served, model_keys, run_of, values_of_run
from rlcore_recipes.settings.evaluation import EvalConfig


def eval_config(file: Path | None, overrides: Sequence[str], candidates: Sequence[Candidate]) -> EvalConfig:
    """Load the configuration of an evaluation of ``candidates``.

    Without a file, the values of the first candidate that is a checkpoint's lie below the overrides.

    Raises:
        ConfigError: it is not valid, or the engine would not load the candidates.
    """
    run = None if file is not None else run_of(candidates)
    base = None if run is None else values_of_run(run.config, EvalConfig)
    if run is not None and getattr(run.config, "reward_model", None) is not None:
        warn("the run's reward_model takes no part: scores are those of its reward alone", RlcoreWarning, stacklevel=1)
    try:
        config = load_config(EvalConfig, file, [*model_keys(candidates), *overrides], base)
    except ConfigError as error:
        if file is None and "reward" not in (base or ()):
            hint = "no run of reinforcement learning is named whose keys would hold: give keys, or a file by --config"
            raise ConfigError(f"{error}\n{hint}") from None
        raise
    check_served(config.rollout, candidates)
    return config
