"""Settings of generation that come from the run of a checkpoint, and from the address of a server."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rlcore.config import Config
from rlcore.errors import ConfigError
from rlcore_recipes.export.source import TrainedModel
from rlcore_recipes.generation.candidates import Candidate
from rlcore_recipes.settings import RolloutSettings
from rlcore_recipes.settings.evaluation import OF_TRAINING
from rlcore_recipes.settings.roles import ValidationRollout, ValidationSampling

_OF_TRAINING_ENGINES = ("enable_lora", "load_format")


def run_of(candidates: Iterable[Candidate]) -> TrainedModel | None:
    """Return the first candidate that is a checkpoint."""
    return next((one.model for one in candidates if isinstance(one.model, TrainedModel)), None)


def values_of_run(config: Config, model: type[Config]) -> dict[str, Any]:
    """Return the values of a run's configuration that the configuration ``model`` has too, but for keys of training."""
    given = config.model_dump(mode="json")
    values = {name: given[name] for name in model.model_fields if given.get(name) is not None and name != "controller"}
    data: Any = model.model_fields["data"].annotation
    left_out = {*OF_TRAINING["data"], *(["val_batch_size"] if values["data"].get("val_batch_size") is None else [])}
    values["data"] = {
        key: value for key, value in values["data"].items() if key in data.model_fields and key not in left_out
    }
    if "rollout" in values:
        if isinstance(getattr(config, "rollout", None), ValidationRollout):
            values["rollout"], longest = _as_rollout(values["rollout"])
            values["data"]["max_response_length"] = longest
        rollout = {key: value for key, value in values["rollout"].items() if key not in OF_TRAINING["rollout"]}
        engine = rollout["engine"]
        section = {key: value for key, value in rollout.get(engine, {}).items() if key not in _OF_TRAINING_ENGINES}
        values["rollout"] = {**rollout, engine: section}
    return values


def _as_rollout(validation: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the values of a `ValidationRollout` as a section ``rollout`` has them, and the longest completion."""
    sampling = {key: value for key, value in validation.items() if key in ValidationSampling.model_fields}
    others = {key: value for key, value in validation.items() if key not in sampling}
    longest = others.pop("max_response_length")
    return {**others, "validation": sampling}, longest


def model_keys(candidates: Sequence[Candidate]) -> list[str]:
    """Return the override that names the model of the first candidate, so that the configuration is complete."""
    if not candidates:
        return []
    model = candidates[0].model
    return [f"model.path={model if isinstance(model, str) else model.config.model.path}"]


def url_keys(urls: Sequence[str]) -> list[str]:
    """Return the overrides that generate on the servers at ``urls``."""
    return ["rollout.engine=http", f"rollout.http.urls={json.dumps(urls)}"] if urls else []


def check_served(rollout: RolloutSettings, candidates: Sequence[Candidate]) -> None:
    """Refuse models that the engine does not load, because it uses running servers.

    Raises:
        ConfigError: there are several, or checkpoints.
    """
    options = rollout.options
    elsewhere = getattr(options, "urls", ()) or getattr(options, "server", None) is not None
    if elsewhere and (len(candidates) > 1 or run_of(candidates) is not None):
        raise ConfigError(
            f"rollout.engine={rollout.engine} generates on running servers, with the model that they serve: name that "
            "model alone (its tokenizer is needed), or choose an engine that loads models here"
        )
