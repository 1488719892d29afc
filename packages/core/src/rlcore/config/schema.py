"""The JSON Schema of configuration files: it accepts what the loader accepts."""

from __future__ import annotations

from typing import Any

from rlcore.config.base import Config
from rlcore.config.files import DEFAULTS_KEY

_NOTES = ("title", "description", "default", "examples")
_SCALARS = ("string", "integer", "number")


def file_schema(model: type[Config]) -> dict[str, Any]:
    """Return the JSON Schema of a file that configures ``model``.

    No key is required in a file: other files below it and overrides give keys too. A list may be one value, and the
    file may name others below itself.
    """
    schema: dict[str, Any] = _relaxed(model.model_json_schema())
    files = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    schema["properties"][DEFAULTS_KEY] = files | {"description": "Configuration files below this one, relative to it."}
    return schema


def _relaxed(node: Any) -> Any:
    """``node`` without required keys, and with a single value in place of each list of any length."""
    if isinstance(node, list):
        return [_relaxed(item) for item in node]
    if not isinstance(node, dict):
        return node
    # where "required" is a key of the configuration, it has a schema and no list
    relaxed = {key: _relaxed(value) for key, value in node.items() if key != "required" or isinstance(value, dict)}
    items = relaxed.get("items")
    if relaxed.get("type") == "array" and isinstance(items, dict) and items.get("type") in _SCALARS:
        notes = {key: relaxed.pop(key) for key in _NOTES if key in relaxed}
        return notes | {"anyOf": [relaxed, items]}
    return relaxed
