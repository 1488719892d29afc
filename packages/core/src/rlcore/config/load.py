"""From a YAML file and overrides to a validated configuration, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rlcore.config import yaml_format
from rlcore.config.base import Config
from rlcore.config.files import Layer, file_layers
from rlcore.config.hints import Hints
from rlcore.config.overlay import open_missing, overlay
from rlcore.config.overrides import COMMAND_LINE, override_layers, schema_at
from rlcore.config.report import problem_lines
from rlcore.errors import ConfigError

C = TypeVar("C", bound=Config)


def load_config(
    model: type[C],
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> C:
    """Load the YAML file ``path`` (None: the defaults of ``model`` alone) with ``overrides``.

    Args:
        base: values that lie below those of the file, such as those of another configuration.
        overrides: ``a.b.c=value`` each, the last one for a key wins. The value is taken as it is if the key takes text,
            and read as YAML otherwise.

    A top-level key ``defaults`` in the file names another file, or several, relative to it, whose values lie below its
    own.

    Raises:
        ConfigError: a file is missing or no YAML mapping, an override is malformed, or the values are not valid; the
            message then has one line per problem.
    """
    layers = [] if base is None else [Layer("values of a run", base)]
    layers += [] if path is None else file_layers(path)
    layers += override_layers(model, overrides)
    return validate_layers(model, layers)


def validate_config(
    model: type[C],
    values: Mapping[str, Any],
    source: str = "values given",
    places: Mapping[yaml_format.KeyPath, str] | None = None,
) -> C:
    """Validate ``values``, nested mappings as in a file.

    Args:
        source: what the values come from, for the title of a message.
        places: where in the source each key was given, for the line of a problem.

    Raises:
        ConfigError: the values are not valid; the message has one line per problem.
    """
    return validate_layers(model, [Layer(source, values, places or {})])


def dump_config(config: Config) -> str:
    """``config`` with all its defaults as YAML, from which `load_config` makes an equal one."""
    return yaml_format.dump(config.model_dump(mode="json"))


def validate_layers(model: type[C], layers: Sequence[Layer]) -> C:
    """Merge ``layers``, of which later ones take precedence, and validate the values.

    Raises:
        ConfigError: the values are not valid; the message has one line per problem.
    """
    values: Any = {}
    for layer in layers:
        values = overlay(model, values, layer.values)
    values = open_missing(model, values)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        placed = [replace(layer, places=_spelled_out(model, layer.places)) for layer in layers]
        lines = problem_lines(error, values, partial(_place, placed), Hints(model))
        sources = "".join(dict.fromkeys(f"; {layer.source}" for layer in layers if layer.source))
        title = f"invalid configuration ({len(lines)} problem{'s' * (len(lines) > 1)}{sources}):"
        raise ConfigError("\n  ".join([title, *lines])) from error


def _spelled_out(model: type[Config], places: Mapping[yaml_format.KeyPath, str]) -> dict[yaml_format.KeyPath, str]:
    """``places``, and that of each short form also for the keys that it is written in place of."""
    found = dict(places)
    for path, place in places.items():
        parent = schema_at(model, [str(key) for key in path[:-1]])
        form = parent.short_forms.get(str(path[-1])) if parent is not None else None
        for key in (form.key, *form.sets) if form is not None else ():
            found.setdefault((*path[:-1], *key.split(".")), place)
    return found


def _place(layers: Sequence[Layer], path: yaml_format.KeyPath) -> str | None:
    """Return where ``path`` was set; a missing key is reported at its parent, in a file if there is one."""
    if all(layer.source == COMMAND_LINE for layer in layers):
        return None  # the title says so
    latest_first = list(reversed(layers))
    files_first = sorted(latest_first, key=lambda layer: layer.source == COMMAND_LINE)
    for length in range(len(path), 0, -1):
        for layer in latest_first if length == len(path) else files_first:
            if path[:length] in layer.places:
                return layer.places[path[:length]]
    return None
