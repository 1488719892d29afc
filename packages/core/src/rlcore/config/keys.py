"""Every key of a configuration model, for help texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as with_default
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from rlcore import plugins
from rlcore.config.algorithm import Algorithm, AlgorithmField
from rlcore.config.base import Config
from rlcore.config.overlay import schema_of_key, schema_of_type
from rlcore.config.sections import PluginName, PluginSections
from rlcore.config.yaml_format import inline
from rlcore.errors import PluginError

_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


@dataclass(frozen=True)
class Key:
    """One key that takes a value.

    Attributes:
        type: readable, such as ``float > 0`` or ``auto | never``.
        default: as written in YAML; None where the key is required, empty where it has none.
        options: the names that it takes, where it takes names.
    """

    name: str
    type: str
    default: str | None
    description: str
    options: tuple[str, ...] = with_default(default=(), compare=False)


@dataclass(frozen=True)
class Section:
    """Keys that stand together under ``path`` (empty for the top level).

    Attributes:
        model: what has these keys; None where it cannot be imported.
    """

    path: str
    description: str
    keys: list[Key]
    model: type[Config] | None = with_default(default=None, compare=False)


def sections(model: type[Config]) -> Iterator[Section]:
    """Yield the keys of ``model`` and of all models below it: sections, installed plugins, parameters of algorithms."""
    return _sections(model, "", None, None, frozenset())


def required(model: type[Config], path: str = "") -> Iterator[str]:
    """Yield the dotted keys that every configuration of ``model`` must set; sections that may be null are left out."""
    for name, field in model.model_fields.items():
        inner = schema_of_key(model, name)
        if isinstance(inner, type) and (field.is_required() or field.default is not None):
            yield from required(inner, _join(path, name))
        elif field.is_required():
            yield _join(path, name)


def _sections(
    model: type[Config], path: str, values: Config | None, description: str | None, within: frozenset[type[Config]]
) -> Iterator[Section]:
    """Yield the keys below ``path``.

    Args:
        values: where to read defaults, for a model whose parent's default differs from the model's own.
        description: what the model's first docstring line would say otherwise.
        within: models of the plugin sections around this one.
    """
    own: list[Key] = []
    below: list[Section] = []
    for name, field in model.model_fields.items():
        default = getattr(values, name) if values is not None else _default(field)
        inner = schema_of_key(model, name)
        place = _join(path, name)
        if isinstance(inner, type):
            below += _sections(inner, place, default if isinstance(default, inner) else None, field.description, within)
            if field.default is not None:
                continue  # its own keys say everything; where it may be null, that is said here
        own.append(
            Key(
                name,
                _type(field.annotation, field.metadata),
                _written(field, default),
                field.description or "",
                _options(model, name, field),
            )
        )
        if isinstance(inner, AlgorithmField):
            for entry in inner.registry:
                if entry.params.model_fields:
                    condition = f"with {place}={entry.name}: {entry.summary}"
                    below += _sections(entry.params, place, None, condition, within)
        elif inner is None:
            below += _elements(field.annotation, place, within)
    for name, form in model.short_forms.items():
        sets = " ".join(f"{_join(path, key)}={text}" for key, text in form.sets.items())
        own.append(Key(name, "text", "", f"Short for {sets} {_join(path, form.key)}=…"))
    if issubclass(model, PluginSections):
        below += _plugins(model, path, values, within)
    yield Section(path, description or (model.__doc__ or "").strip().partition("\n")[0], own, model)
    yield from below


def _elements(annotation: Any, path: str, within: frozenset[type[Config]]) -> Iterator[Section]:
    """Yield the keys of models in lists and mappings."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (list, tuple) and isinstance(model := schema_of_type(arguments[0]), type):
        yield from _sections(model, f"{path}[]", None, None, within)
    elif origin is dict and isinstance(model := schema_of_type(arguments[1]), type):
        yield from _sections(model, f"{path}.<name>", None, None, within)


def _plugins(
    model: type[PluginSections], path: str, values: Config | None, within: frozenset[type[Config]]
) -> Iterator[Section]:
    given = (values.__pydantic_extra__ if values is not None else None) or {}
    for name in plugins.names(model.plugin_group):
        place = _join(path, name)
        try:
            section = model.section_model(name)
        except PluginError as error:
            yield Section(place, str(error), [])
            continue
        if section not in within:  # a plugin may hold plugins of the same group
            yield from _sections(section, place, given.get(name), None, within | {section})


def _options(model: type[Config], name: str, field: FieldInfo) -> tuple[str, ...]:
    """Return the names that a key takes: of plugins, of registered algorithms, or listed in its type."""
    if issubclass(model, PluginSections) and name == model.plugin_field:
        return tuple(plugins.names(model.plugin_group))
    for item in field.metadata:
        if isinstance(item, AlgorithmField):
            return tuple(entry.name for entry in item.registry)
        if isinstance(item, PluginName):
            return tuple(plugins.names(item.group))
    return tuple(text for text in _literals(field.annotation) if isinstance(text, str))


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for argument in get_args(annotation):
            if isinstance(argument, AlgorithmField):
                yield from (entry.name for entry in argument.registry)
            else:
                yield from _literals(argument)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _default(field: FieldInfo) -> Any:
    """Return the field's default; None also where it is required or (for lack of a plugin) cannot be built."""
    if field.is_required():
        return None
    try:
        return field.get_default(call_default_factory=True, validated_data={})
    except ValidationError:
        return None


def _written(field: FieldInfo, default: Any) -> str | None:
    if default is None and field.is_required():
        return None
    if isinstance(default, Algorithm):
        return default.name
    if isinstance(default, Mapping) and "name" in default:
        return str(default["name"])
    return inline(to_jsonable_python(default))


def _type(annotation: Any, metadata: Any = ()) -> str:
    for item in metadata:
        if isinstance(item, AlgorithmField):
            return " | ".join(entry.name for entry in item.registry)
        if isinstance(item, PluginName):
            return " | ".join(plugins.names(item.group))
    bounds = [
        f"{sign} {_number(getattr(item, name))}"
        for item in metadata
        for name, sign in _BOUNDS.items()
        if hasattr(item, name)
    ]
    plain = _plain_type(annotation)
    either = plain.removesuffix(" | null")
    return " ".join([either, " and ".join(bounds)]).rstrip() + plain[len(either) :]


def _number(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def _plain_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(_plain_type(argument) for argument in arguments))
    if origin is Literal:
        return " | ".join(map(inline, arguments))
    if annotation is NoneType:
        return "null"
    if isinstance(schema_of_type(annotation), type):
        return "keys"
    if origin in (list, tuple, dict):
        inner = ", ".join(_plain_type(argument) for argument in arguments if argument is not Ellipsis)
        return f"{'mapping' if origin is dict else 'list'} of {inner}"
    return {"str": "text"}.get(name := getattr(annotation, "__name__", str(annotation)), name).lower()
