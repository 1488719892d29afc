"""Validation errors as a person reads them: one line per problem, with the key, what is wrong, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from rlcore.config.base import LONGEST_NAME
from rlcore.config.hints import Hints
from rlcore.config.yaml_format import KeyPath, inline, shortened

_LONGEST_VALUE = 80
_LONGEST_MESSAGE = 1000
_MOST_LINES = 100


def problem_lines(error: ValidationError, data: Any, place: Callable[[KeyPath], str | None], hints: Hints) -> list[str]:
    """Return one line per key that has problems.

    Args:
        data: what was validated.
        place: where a key was given ("run.yaml:12"), or None where it was not.
        hints: what unknown keys and names might have been.
    """
    problems: dict[KeyPath, list[str]] = {}
    values: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False, include_input=True):
        path = _keys(detail["loc"], data)
        message, value = _message(detail, path, hints)
        if isinstance(detail["input"], str):  # some messages repeat it
            message = message.replace(detail["input"], shortened(detail["input"], _LONGEST_VALUE))
        if message not in problems.setdefault(path, []):
            problems[path].append(message)
        values[path] = value
    lines = []
    for path, messages in problems.items():
        key = f"{'.'.join(shortened(str(item), LONGEST_NAME) for item in path)}: " if path else ""
        alternatives = all(message.startswith("must ") for message in messages)  # the branches of a union
        where = f"  ({place(path)})" if place(path) is not None else ""
        text = shortened((" or " if alternatives else "; ").join(messages), _LONGEST_MESSAGE)
        lines.append(key + text + values[path] + where)
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
    return lines


def _message(detail: Any, path: KeyPath, hints: Hints) -> tuple[str, str]:
    """Return the message of a problem, with the given value if the message needs it."""
    kind, value = detail["type"], detail["input"]
    if kind == "unknown_key" and path:
        return f"unknown key; {hints.key(path, detail['ctx']['known'], value)}", ""
    message, given = _plain_message(kind, value, detail)
    if kind in ("literal_error", "choice", "plugin"):
        name = value.get("name") if isinstance(value, Mapping) else value
        hint = hints.value(path, name) if isinstance(name, str) else None
        if hint is not None and not (hint.startswith("did you mean") and "did you mean" in message):
            return message, f"{given}; {hint}"
    return message, given


def _plain_message(kind: str, value: Any, detail: Any) -> tuple[str, str]:
    if kind == "missing":
        return "is required", ""
    if kind == "model_type":
        return "must be a mapping of keys", _given(value)
    if kind in ("string_type", "path_type"):
        quotes = "; in quotes it would be text" if isinstance(value, (int, float)) else ""
        return ("must be text" if kind == "string_type" else "must be a path"), _given(value) + quotes
    if kind in ("value_error", "assertion_error"):
        return str(detail["ctx"]["error"]) if "ctx" in detail else detail["msg"].partition(", ")[2], ""
    message = detail["msg"].partition(", unable to")[0].partition(", got ")[0].partition(" after validation")[0]
    subject, should, rest = message.partition(" should ")
    if should and " " not in subject:  # Input, String, List …
        return f"must {rest}", _given(value)
    if kind == "choice" and message.startswith("must be"):
        return message, _given(value)
    return message, ""


def _given(value: Any) -> str:
    if isinstance(value, str):
        value = value[: _LONGEST_VALUE + 1]
    try:
        text = inline(to_jsonable_python(value, fallback=repr, bytes_mode="base64"))
    except Exception:  # keys and values of any kind; the message matters more than how they are written
        text = repr(value)
    return f", not {shortened(text, _LONGEST_VALUE)}"


def _keys(location: Sequence[str | int], data: Any) -> KeyPath:
    """``location`` without the names that pydantic puts in for the branches of unions, which are no keys."""
    path: list[str | int] = []
    known = True  # data still is the value at path
    for index, item in enumerate(location):
        if known and _holds(data, item):
            path.append(item)
            data = data[item]
        elif known and (
            not isinstance(data, (Mapping, list, tuple)) or any(_holds(data, later) for later in location[index + 1 :])
        ):
            continue
        else:
            path.append(item)
            known = False
    return tuple(path)


def _holds(data: Any, item: str | int) -> bool:
    if isinstance(data, Mapping):
        return item in data
    return isinstance(data, (list, tuple)) and isinstance(item, int) and item < len(data)
