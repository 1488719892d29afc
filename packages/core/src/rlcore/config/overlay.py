"""Layers of configuration: which values win, and what a mapping laid over a name or over a default means."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rlcore.config.algorithm import Algorithm, AlgorithmField
from rlcore.config.base import Config
from rlcore.config.sections import PluginSections
from rlcore.errors import PluginError


def schema_of_key(model: type[Config], key: str) -> type[Config] | AlgorithmField | None:
    """Return how a mapping under ``key`` of ``model`` is read: model, algorithm's parameters, or plain (None)."""
    field = model.model_fields.get(key)
    if field is not None:
        return schema_of_type(field.annotation, field.metadata)
    if issubclass(model, PluginSections):
        try:
            return model.section_model(key)
        except PluginError:
            return None
    return None


def schema_of_type(annotation: Any, metadata: Any = ()) -> type[Config] | AlgorithmField | None:
    """Return how a mapping is read for a field of this type (see `schema_of_key`)."""
    for item in metadata:
        if isinstance(item, AlgorithmField):
            return item
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return schema_of_type(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        found = [schema_of_type(argument) for argument in arguments if argument is not NoneType]
        return found[0] if len(found) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Config) else None


def overlay(kind: type[Config] | AlgorithmField | None, below: Any, above: Any) -> Any:
    """Merge ``above``, which takes precedence, with ``below``.

    Mappings merge key by key, other values replace. A mapping for a field that no source has set yet is merged with the
    field's default. An algorithm keeps its parameters unless another name is chosen.
    """
    if isinstance(kind, AlgorithmField):
        return _overlay_algorithm(below, above)
    if kind is not None and isinstance(above, str):
        above = kind.from_text(above) or above
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        if kind is None or not isinstance(above, Mapping):
            return above
        below = {}
    if kind is not None:
        with suppress(ValueError):  # the source contradicts itself; validation reports that with the key
            above = kind.spelled_out(above)
    merged = dict(below)
    for key, value in above.items():
        inner = schema_of_key(kind, key) if kind is not None and isinstance(key, str) else None
        if key in merged:
            under = merged[key]
        else:
            under = _explicit(kind.model_fields.get(key)) if kind is not None and inner is not None else None
        merged[key] = overlay(inner, under, value)
    return merged


def _overlay_algorithm(below: Any, above: Any) -> Any:
    under = {"name": below} if isinstance(below, str) else below
    if not (isinstance(under, Mapping) and isinstance(above, Mapping)):
        return above
    if "name" in under and above.get("name", under["name"]) != under["name"]:
        return above
    return {**under, **above}


def open_missing(model: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with an empty mapping for every inner model that is missing and cannot be built.

    It is missing a required key, or its default factory fails. Validation then names the inner keys, with their paths
    and together with all other problems.
    """
    opened = dict(values)
    for key, field in model.model_fields.items():
        inner = schema_of_key(model, key)
        if not isinstance(inner, type):
            continue
        if key not in values and not _buildable(inner, field):
            opened[key] = {}
        if isinstance(opened.get(key), Mapping):
            opened[key] = open_missing(inner, opened[key])
    return opened


def _buildable(inner: type[Config], field: FieldInfo) -> bool:
    if field.is_required():
        return not any(required.is_required() for required in inner.model_fields.values())
    try:
        field.get_default(call_default_factory=True, validated_data={})
    except ValidationError:
        return False
    return True


def _explicit(field: FieldInfo | None) -> Any:
    """Return what a field's default sets, as plain values, without what the model sets by default."""
    if field is None or field.is_required():
        return None
    try:
        default = field.get_default(call_default_factory=True, validated_data={})
    except ValidationError:  # see open_missing
        return None
    if isinstance(default, Config):
        given = default.model_dump(mode="json", exclude_unset=True)
        # a plugin's section that says nothing would stay when another plugin is named
        return {key: value for key, value in given.items() if value != {}}
    return default.dump() if isinstance(default, Algorithm) else default
