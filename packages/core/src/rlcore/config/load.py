"""From a YAML file and overrides to a validated configuration, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rlcore.config import yaml_format
from rlcore.config.base import Config
from rlcore.config.overlay import open_missing, overlay
from rlcore.config.report import problem_lines
from rlcore.errors import ConfigError

C = TypeVar("C", bound=Config)

DEFAULTS_KEY = "defaults"
_COMMAND_LINE = "command line"
_OVERRIDE = re.compile(r"(?P<key>\w[\w-]*(?:\.\w[\w-]*)*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class _Layer:
    """Values from one source, and where in it each key stands."""

    source: str
    values: Mapping[str, Any]
    places: Mapping[yaml_format.KeyPath, str] = field(default_factory=dict)


def load_config(model: type[C], path: Path | str | None = None, overrides: Sequence[str] = ()) -> C:
    """The configuration in the YAML file ``path`` (the model's defaults alone where None) under ``overrides``.

    Args:
        overrides: ``a.b.c=value`` each, the value in YAML; the last one for a key wins.

    A top-level key ``defaults`` in the file names another file, or several, relative to it, whose values lie below its
    own.

    Raises:
        ConfigError: a file is missing or no YAML mapping, an override is malformed, or the values are not valid; the
            message then has one line per problem.
    """
    layers = [] if path is None else _file_layers(Path(path), ())
    layers += _override_layers(overrides)
    return _validated(model, layers)


def validate_config(model: type[C], values: Mapping[str, Any]) -> C:
    """The configuration in ``values``, nested mappings as in a file.

    Raises:
        ConfigError: the values are not valid; the message has one line per problem.
    """
    return _validated(model, [_Layer("values given", values)])


def dump_config(config: Config) -> str:
    """``config`` with all its defaults as YAML, from which `load_config` makes an equal one."""
    return yaml_format.dump(config.model_dump(mode="json"))


def _validated(model: type[C], layers: Sequence[_Layer]) -> C:
    values: Any = {}
    for layer in layers:
        values = overlay(model, values, layer.values)
    values = open_missing(model, values)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = problem_lines(error, values, partial(_place, layers))
        sources = "".join(dict.fromkeys(f"; {layer.source}" for layer in layers))
        title = f"invalid configuration ({len(lines)} problem{'s' * (len(lines) > 1)}{sources}):"
        raise ConfigError("\n  ".join([title, *lines])) from error


def _place(layers: Sequence[_Layer], path: yaml_format.KeyPath) -> str | None:
    """Where ``path`` was given; a key that is missing is missing where its parent stands, in a file if there is one."""
    if all(layer.source == _COMMAND_LINE for layer in layers):
        return None  # the title says so
    latest_first = list(reversed(layers))
    files_first = sorted(latest_first, key=lambda layer: layer.source == _COMMAND_LINE)
    for length in range(len(path), 0, -1):
        for layer in latest_first if length == len(path) else files_first:
            if path[:length] in layer.places:
                return layer.places[path[:length]]
    return None


def _file_layers(path: Path, including: tuple[Path, ...]) -> list[_Layer]:
    if path.resolve() in including:
        raise ConfigError(f"{path}: includes itself through '{DEFAULTS_KEY}'")
    by = f" (named by '{DEFAULTS_KEY}' in {including[-1]})" if including else ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file{by}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read{by}: {error}") from None
    values, lines = yaml_format.parse(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: must be a mapping of keys, not {yaml_format.inline(values)[:80]}")
    below = values.pop(DEFAULTS_KEY, [])
    names = [below] if isinstance(below, str) else below
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        line = lines[DEFAULTS_KEY,]
        raise ConfigError(f"{path}:{line}: {DEFAULTS_KEY} must be a file name or a list of them")
    layers = [layer for name in names for layer in _file_layers(path.parent / name, (*including, path.resolve()))]
    return [*layers, _Layer(str(path), values, {key: f"{path}:{line}" for key, line in lines.items()})]


def _override_layers(overrides: Sequence[str]) -> list[_Layer]:
    """A layer per override, the names of choices before their parameters, which another name would undo."""
    layers = []
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            raise ConfigError(f"override {override!r}: must look like a.b.c=value")
        path = tuple(match["key"].split("."))
        try:
            value, _ = yaml_format.parse(match["value"], f"override {match['key']}")
        except ConfigError as error:
            raise ConfigError(f"{error}; put text with special characters in quotes: '{match['key']}=\"…\"'") from None
        values: Any = value
        for key in reversed(path):
            values = {key: values}
        layer = _Layer(_COMMAND_LINE, values, {path[:length]: _COMMAND_LINE for length in range(1, len(path) + 1)})
        layers.append(((len(path), path[-1] != "name"), layer))
    return [layer for _, layer in sorted(layers, key=lambda item: item[0])]
