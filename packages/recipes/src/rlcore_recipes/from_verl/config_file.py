"""Configuration files of verl: its own, those of its users, and those that Hydra writes for a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlcore.config import yaml_format
from rlcore.config.files import read_text
from rlcore.errors import ConfigError
from rlcore.suggestions import similar_paths
from rlcore_recipes.from_verl.assignment import Assignment, VerlCommand
from rlcore_recipes.from_verl.hydra import parse_override
from rlcore_recipes.from_verl.interpolation import resolved

_DEEPEST = 16  # files that name each other below `defaults`

OWN_CONFIGS = ("ppo_trainer", "ppo_megatron_trainer", "sft_trainer", "sft_trainer_engine", "evaluation", "generation")
"""Configurations of verl itself, whose values are verl's defaults."""
_OWN = re.compile(
    r"(?:\w+_)?(?:ppo|dapo|sft|spin|sppo|prime|entropy)_(?:\w+_)?trainer(?:_engine)?|evaluation|generation"
)
_OWN_GROUPS = (
    *("actor", "critic", "data", "ref", "rollout", "model", "reward", "reward_model", "reward_manager", "algorithm"),
    *("profiler", "npu_profile", "optim", "engine", "distillation", "legacy_reward_impl", "transfer_queue"),
)

_OF_SFT = (
    "model.",
    "optim.",
    "engine.",
    "data.max_length",
    "data.messages_key",
    "data.response_key",
    "data.multiturn.",
)


def own_config(name: str) -> bool:
    """Return whether verl has a configuration of this name."""
    return _OWN.fullmatch(name) is not None


def read_config_file(path: Path, environment: Mapping[str, str]) -> VerlCommand:
    """Read a YAML file of verl: a configuration or a part of one, or the ``overrides.yaml`` that Hydra writes.

    Args:
        environment: for ``${oc.env:NAME}``.

    Raises:
        ConfigError: it cannot be read, or a value refers to a key that is not given.
    """
    assignments = assignments_of_file(path, environment)
    if not assignments:
        raise ConfigError(f"{path}: sets no key of verl")
    assignments = list(resolved(assignments, environment))
    return VerlCommand(_entry(assignments), tuple(assignments))


def assignments_of_file(path: Path, environment: Mapping[str, str], depth: int = 0) -> list[Assignment]:
    """Return what the file ``path`` and the files below it set; interpolations are left.

    Raises:
        ConfigError: a file is missing or no YAML that verl would read.
    """
    if depth > _DEEPEST:
        raise ConfigError(f"{path}: the files that 'defaults' name include each other")
    values, lines = yaml_format.parse(read_text(path, "file", hint=similar_paths), str(path))
    if isinstance(values, list) and all(isinstance(item, str) for item in values):
        return [parse_override(item, f"{path}:{lines.get((index,), 1)}") for index, item in enumerate(values)]
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: must be a mapping of verl's keys, or a list of overrides")
    places = {key: f"{path}:{line}" for key, line in lines.items()}
    below: list[Assignment] = []
    for index, item in enumerate(_listed(values.pop("defaults", []))):
        below += _default(item, path, places.get(("defaults", index), str(path)), environment, depth)
    return [*below, *_leaves(values, (), places)]


def _listed(defaults: Any) -> list[Any]:
    return defaults if isinstance(defaults, list) else [defaults]


def _default(item: Any, path: Path, place: str, environment: Mapping[str, str], depth: int) -> Iterator[Assignment]:
    """Yield what an entry of ``defaults`` sets. Verl's own files hold its defaults, which the translation knows."""
    if isinstance(item, dict) and len(item) == 1:
        group, chosen = next(iter(item.items()))
        folder = group.removeprefix("override ").removeprefix("optional ").partition("@")[0].strip("/")
        if folder == "model_engine":
            yield Assignment("model_engine", chosen, "", place)
            return
        if folder in _OWN_GROUPS or folder.startswith("hydra/"):
            return
        package = group.partition("@")[2] or folder.replace("/", ".")
        file = path.parent / folder / f"{chosen}.yaml"
        for assignment in _named(file, place, environment, depth):
            yield Assignment(f"{package}.{assignment.key}", assignment.value, "", assignment.place)
        return
    if not isinstance(item, str):
        raise ConfigError(f"{place}: an entry of 'defaults' is a name or one group with its choice")
    name = item.strip("/").removesuffix(".yaml")
    file = path.parent / f"{name}.yaml"
    if name == "_self_":
        return
    if own_config(name):
        if "megatron" in name:
            yield Assignment("model_engine", "megatron", "", place)
    elif name not in _OWN_GROUPS:
        yield from _named(file, place, environment, depth)


def _named(file: Path, place: str, environment: Mapping[str, str], depth: int) -> list[Assignment]:
    if not file.is_file():
        raise ConfigError(f"{place}: 'defaults' names {file}, which does not exist{similar_paths(file)}")
    return assignments_of_file(file, environment, depth + 1)


def _leaves(value: Any, path: tuple[str, ...], places: Mapping[yaml_format.KeyPath, str]) -> Iterator[Assignment]:
    if path in (("hydra", "searchpath"), ("hydra",)) and not isinstance(value, dict):
        return  # where Hydra looks for files
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key), places)
    elif path and path[-1] != "_target_" and value != "???":  # the section's class in verl; a value still to be given
        yield Assignment(".".join(path), value, "", places.get(path, "YAML"))


def _entry(assignments: list[Assignment]) -> str:
    """Return the module that reads such a configuration."""
    values = {assignment.key: assignment.value for assignment in assignments}
    reinforcement = ("actor_rollout_ref.", "algorithm.", "critic.", "reward")
    if not any(key.startswith(reinforcement) for key in values) and any(key.startswith(_OF_SFT) for key in values):
        legacy = any(key.startswith(("model.partial_pretrain", "model.fsdp_config")) for key in values)
        return "verl.trainer.fsdp_sft_trainer" if legacy else "verl.trainer.sft_trainer"
    if values.get("algorithm.filter_groups.enable") is True:
        return "recipe.dapo.main_dapo"
    return "verl.trainer.main_ppo"
