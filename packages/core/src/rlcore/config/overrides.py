"""Overrides: ``a.b.c=value`` on the command line, ``{"a.b.c": value}`` in Python."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from rlcore.config import yaml_format
from rlcore.config.algorithm import AlgorithmField
from rlcore.config.base import LONGEST_NAME, Config
from rlcore.config.files import Layer
from rlcore.config.overlay import schema_of_key, schema_of_type
from rlcore.config.values import is_list_of_text, is_text, plain_types
from rlcore.config.yaml_format import inline, shortened
from rlcore.errors import ConfigError

COMMAND_LINE = "command line"
_OVERRIDE = re.compile(r"(?P<key>\w[\w-]*(?:\.\w[\w-]*)*)=(?P<value>.*)", re.DOTALL)


def override_layers(model: type[Config], overrides: Sequence[str]) -> list[Layer]:
    """Return a layer per override; names of algorithms come before their parameters, which a name resets.

    Raises:
        ConfigError: an override has no key, its value is not YAML, or a short form contradicts another override.
    """
    given = []
    for override in overrides:
        match = _OVERRIDE.fullmatch(override)
        if match is None:
            raise ConfigError(f"override {shortened(override)!r}: must look like a.b.c=value")
        path = tuple(match["key"].split("."))
        given.append((path, _value(model, path, match["value"])))
    return _layers(model, given, COMMAND_LINE)


def value_layers(model: type[Config], values: Mapping[str, Any], source: str) -> list[Layer]:
    """Return a layer per value, as `override_layers` does for text.

    Args:
        values: by dotted key; a mapping is laid over what the section has.
        source: where problems say that the values stand.

    Raises:
        ConfigError: a short form contradicts another value.
    """
    return _layers(model, [(tuple(key.split(".")), value) for key, value in values.items()], source)


def _layers(model: type[Config], given: Sequence[tuple[tuple[str, ...], Any]], source: str) -> list[Layer]:
    layers = []
    for path, value in given:
        values = value
        for key in reversed(path):
            values = {key: values}
        layer = Layer(source, values, dict.fromkeys(_key_paths(values), source))
        layers.append(((len(path), path[-1] != "name"), layer))
    _check_short_forms(model, dict(given))
    return [layer for _, layer in sorted(layers, key=lambda item: item[0])]


def _key_paths(values: Any, parents: yaml_format.KeyPath = ()) -> Iterator[yaml_format.KeyPath]:
    """Yield every key of nested mappings and lists."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*parents, key)
        yield from _key_paths(value, (*parents, key))


def _value(model: type[Config], path: tuple[str, ...], text: str) -> Any:
    """Parse the text after ``=``.

    They are taken as they are for a key that takes text (``null`` alone is null where the key may be null) or a list of
    texts (unless they begin with ``[``), and read as YAML otherwise.
    """
    kind = type_at(model, path)
    if is_text(kind):
        return None if text == "null" and NoneType in plain_types(kind) else text
    if is_list_of_text(kind) and text != "null" and not text.lstrip().startswith("["):
        return text
    key = shortened(".".join(path), LONGEST_NAME)
    try:
        value = yaml_format.parse(text, f"override {key}")[0]
        if _lost(text.strip(), value):
            raise ConfigError(f"override {key}: YAML reads {shortened(text)!r} as {inline(value)}")
    except ConfigError as error:
        raise ConfigError(f"{error}; put text with special characters in quotes: '{key}=\"…\"'") from None
    return value


def _lost(text: str, value: Any) -> bool:
    """Return whether YAML dropped a part of unquoted ``text`` that it took for a comment or an anchor."""
    if value is None:
        return text not in ("", "~", "null", "Null", "NULL")
    return isinstance(value, str) and text[0] not in "'\"" and value != text


def type_at(model: type[Config], path: Sequence[str]) -> Any:
    """Return the type of the key ``path`` of ``model``, short forms included; None if it has none or is unknown."""
    key, *rest = path
    if not rest and (form := model.short_forms.get(key)):
        return type_at(model, form.key.split("."))
    field = model.model_fields.get(key)
    if field is None:
        inner = schema_of_key(model, key)  # a plugin's section
        return type_at(inner, rest) if isinstance(inner, type) and rest else None
    return _type_within(field.annotation, field.metadata, rest)


def _type_within(annotation: Any, metadata: Any, path: Sequence[str]) -> Any:
    if not path:
        return annotation
    inner = schema_of_type(annotation, metadata)
    if isinstance(inner, AlgorithmField):
        if path[0] == "name":
            return str
        models = [entry.params for entry in inner.registry if path[0] in entry.params.model_fields]
        return type_at(models[0], path) if models else None
    if inner is not None:
        return type_at(inner, path)
    arguments = get_args(annotation)
    return _type_within(arguments[1], (), path[1:]) if get_origin(annotation) is dict else None


def _check_short_forms(model: type[Config], given: Mapping[tuple[str, ...], Any]) -> None:
    for path in given:
        parent = schema_at(model, path[:-1])
        form = parent.short_forms.get(path[-1]) if parent is not None else None
        for key, text in form.sets.items() if form is not None else ():
            other = given.get((*path[:-1], key), text)
            if other != text:
                name, key = ".".join(path), ".".join((*path[:-1], key))
                raise ConfigError(f"{name} means {key}={text}, but {key}={other} is given too; keep one of them")


def schema_at(model: type[Config], path: Sequence[str]) -> type[Config] | None:
    """Return the model of the section ``path`` of ``model``; None if there is none."""
    for key in path:
        inner = schema_of_key(model, key)
        if not isinstance(inner, type):
            return None
        model = inner
    return model
