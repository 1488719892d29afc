"""Replies as actions, and observations as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

_TOOL_ACTIONS = {"Action", "CallToolAction", "ListToolsAction"}


def has_tools(schema: Schema) -> bool:
    """Return whether actions are calls of the server's tools: their schema is then one of OpenEnv's own classes."""
    return schema.get("title") in _TOOL_ACTIONS


def text_field(schema: Schema) -> str | None:
    """Return the only field that an action requires, if it is text."""
    required = schema.get("required", [])
    if len(required) != 1 or schema["properties"][required[0]].get("type") != "string":
        return None
    return str(required[0])


def action_of(text: str, field: str | None) -> dict[str, Any]:
    """Return the action that a reply is.

    Args:
        field: that the text becomes; None if the text is JSON.

    Raises:
        ValueError: the text is not a JSON object.
    """
    if field is not None:
        return {field: text}
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json")
    try:
        action = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Your reply is not a JSON object: {error}") from None
    if not isinstance(action, dict):
        raise ValueError(f"Your reply is JSON, but not an object: {text[:100]}")
    return action


def described(schema: Schema) -> str:
    """Return what the policy must know to write actions as JSON."""
    fields = {name: value for name, value in schema.get("properties", {}).items() if name != "metadata"}
    kept = {"properties": fields, "required": schema.get("required", [])}
    if "$defs" in schema:
        kept["$defs"] = schema["$defs"]
    return f"Reply with one JSON object that fits this schema:\n{json.dumps(kept, ensure_ascii=False)}"


def text_of(observation: Mapping[str, Any], field: str | None) -> str:
    """Return an observation for the policy: the text in ``field``, by default in the only field that is text, or JSON.

    Raises:
        KeyError: there is no such field.
    """
    if field is not None:
        value = observation[field]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(observation) == 1:
        [value] = observation.values()
        if isinstance(value, str):
            return value
    return json.dumps(dict(observation), ensure_ascii=False)
