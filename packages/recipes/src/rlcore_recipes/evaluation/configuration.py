"""The configuration of an evaluation, from a file, from keys, or from the run that a model comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from warnings import warn

from rlcore.config import Config, load_config
from rlcore.errors import ConfigError, RlcoreWarning
from rlcore_recipes.evaluation.candidates import Candidate
from rlcore_recipes.export.source import TrainedModel
from rlcore_recipes.settings.evaluation import OF_TRAINING, EvalConfig, served_elsewhere

_SHARED = ("seed", "model", "data", "rollout", "reward")
_OF_TRAINING_ENGINES = ("enable_lora", "load_format")


def eval_config(file: Path | None, overrides: Sequence[str], candidates: Sequence[Candidate]) -> EvalConfig:
    """Load the configuration of an evaluation of ``candidates``.

    Without a file, the values of the first candidate that is a checkpoint's lie below the overrides.

    Raises:
        ConfigError: it is not valid, or the engine would not load the candidates.
    """
    runs = [one.model for one in candidates if isinstance(one.model, TrainedModel)]
    base = values_of_run(runs[0].config) if file is None and runs else None
    if base and getattr(runs[0].config, "reward_model", None) is not None:
        warn("the run's reward_model takes no part: scores are those of its reward alone", RlcoreWarning, stacklevel=1)
    named = [f"model.path={one.model}" for one in candidates[:1] if isinstance(one.model, str)]
    if runs and not named:
        named = [f"model.path={runs[0].config.model.path}"]
    try:
        config = load_config(EvalConfig, file, [*named, *overrides], base)
    except ConfigError as error:
        if file is None and not base:
            hint = "no run of reinforcement learning is named whose keys would hold: give keys, or a file by --config"
            raise ConfigError(f"{error}\n{hint}") from None
        raise
    if served_elsewhere(config.rollout.options) and (len(candidates) > 1 or runs):
        raise ConfigError(
            f"rollout.engine={config.rollout.engine} generates on running servers, with the model that they serve: "
            "name that model alone (its tokenizer is needed), or choose an engine that loads models here"
        )
    return config


def values_of_run(config: Config) -> dict[str, Any]:
    """Return the values of a run's configuration that an evaluation has too; none of a run that does not sample."""
    values = {name: section for name, section in config.model_dump(mode="json").items() if name in _SHARED}
    if "rollout" not in values:
        return {}
    for name, keys in OF_TRAINING.items():
        values[name] = {key: value for key, value in values[name].items() if key not in keys}
    if values["data"]["val_batch_size"] is None:
        del values["data"]["val_batch_size"]
    engine = values["rollout"]["engine"]
    section = values["rollout"].get(engine, {})
    values["rollout"][engine] = {key: value for key, value in section.items() if key not in _OF_TRAINING_ENGINES}
    return values
