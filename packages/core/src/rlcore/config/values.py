"""Types and rules of single values that every configuration model shares.

`Config` applies `has_bytes`, `unusable` and `out_of_range` to each of its fields: a new key gets these rules by itself.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Le, Lt
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

LARGEST_INTEGER = 2**31 - 1
"""The bound of integers whose field sets none: no count of steps, tokens, prompts or MiB is larger."""
DEEPEST = 64
"""Levels of lists and mappings in one value."""

_NUMBER = re.compile(r"\s*[-+]?[0-9._]+([eE][-+]?[0-9]+)?\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def expanded(value: Any) -> Any:
    """``value``, a path or text, with ``~`` for the home folder and ``${NAME}`` for an environment variable.

    Raises:
        PydanticCustomError: it is empty, the variable is not set, or there is no such home folder.
    """
    if not isinstance(value, (str, Path)):
        return value  # not text: the field's own type says so
    text = str(value)
    if not text or "\0" in text:
        raise PydanticCustomError("path", "must be a path, not {what}", {"what": "empty" if not text else "a NUL byte"})
    text = _VARIABLE.sub(_environment, text)
    if not text.startswith("~"):
        return text
    home = os.path.expanduser(text)
    if home == text:
        user = text.partition("/")[0]
        raise PydanticCustomError("path", "there is no home folder {user}", {"user": user})
    return home


def _environment(match: re.Match[str]) -> str:
    value = os.environ.get(match[1])
    if value is None:
        raise PydanticCustomError("path", "the environment variable {name} is not set", {"name": match[1]})
    return value


def is_url(value: object) -> bool:
    """Return whether text, or a path (in which `Path` leaves one slash), begins like a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(value)) is not None


def _on_this_machine(path: Path) -> Path:
    if is_url(path):
        raise PydanticCustomError("path", "must be a file or folder on this machine, not a URL")
    return path


_EXPANDED = BeforeValidator(expanded)
FilePath = Annotated[Path, _EXPANDED, AfterValidator(_on_this_machine)]
"""A file or folder on this machine, no URL; ``~`` and ``${NAME}`` are expanded."""
FileName = Annotated[str, _EXPANDED]
"""Text that may name a file or folder (or something else: a Hub name, a URL); ``~`` and ``${NAME}`` are expanded."""


def _number(value: float) -> float:
    if math.isnan(value):
        raise PydanticCustomError("finite_number", "must be a number or .inf, not .nan")
    return value


Unlimited = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_number)]
"""A limit that infinity (``.inf``) switches off; every other float of a configuration is finite."""


Seconds = Annotated[float, Field(le=1e8)]
"""A time; longer ones (three years) are beyond what the operating system's waits take."""


def is_path(annotation: Any, metadata: Any = ()) -> bool:
    """Return whether values of this type, or elements of a list of it, are expanded like paths."""
    if any(item is _EXPANDED for item in metadata):
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_path(arguments[0], arguments[1:])
    return origin in (Union, UnionType, list, tuple) and any(is_path(argument) for argument in arguments)


def is_text(annotation: Any) -> bool:
    """Return whether a value is text or a path (or null), and nothing else."""
    alternatives = [kind for kind in plain_types(annotation) if kind is not NoneType]
    return bool(alternatives) and all(kind in (str, Path) for kind in alternatives)


def is_list(annotation: Any) -> bool:
    """Return whether a value is a list of any length (or null)."""
    alternatives = [kind for kind in _alternatives(annotation) if kind is not NoneType]
    return bool(alternatives) and all(
        get_origin(kind) is list or (get_origin(kind) is tuple and get_args(kind)[-1:] == (Ellipsis,))
        for kind in alternatives
    )


def is_list_of_text(annotation: Any) -> bool:
    """Return whether a value is a list of any length (or null) whose elements are text or paths."""
    lists = [kind for kind in _alternatives(annotation) if kind is not NoneType]
    return is_list(annotation) and all(get_args(kind) and is_text(get_args(kind)[0]) for kind in lists)


def plain_types(annotation: Any) -> list[Any]:
    """Return the types in ``annotation``: the alternatives of a union, generic types without their arguments."""
    return [get_origin(kind) or kind for kind in _alternatives(annotation)]


def _alternatives(annotation: Any) -> list[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin in (Union, UnionType):
        return [kind for argument in arguments for kind in _alternatives(argument)]
    return [annotation]


def has_bytes(value: Any) -> bool:
    """Return whether ``value``, or an element of it, is bytes, which pydantic would accept as text."""
    elements = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(item, (bytes, bytearray)) for item in (value, *elements))


def reinterpreted(value: Any, annotation: Any) -> str | None:
    """Return why a value, which pydantic would convert to another type, is wrong; None if it is right.

    It takes true for 1, "8" for 8, and 1 or "yes" for true.
    """
    kinds = set(plain_types(annotation)) - {NoneType, Literal}
    names = [name for kind in _alternatives(annotation) if get_origin(kind) is Literal for name in get_args(kind)]
    if isinstance(value, bool):
        kinds |= {type(name) for name in names}
        return "must be a number" if kinds & {int, float} and kinds <= {int, float, str} else None
    if kinds == {bool} and isinstance(value, (int, float, str)) and value not in names:
        return "must be true or false"
    if kinds and kinds <= {int, float} and isinstance(value, str) and value not in names and _NUMBER.fullmatch(value):
        return "must be a number without quotes"
    if isinstance(value, (list, tuple)):
        return next(
            (problem for item, kind in _elements(value, annotation) if (problem := reinterpreted(item, kind))), None
        )
    return None


def _elements(value: Sequence[Any], annotation: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the elements of a list, each with its type."""
    for kind in _alternatives(annotation):
        arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
        if get_origin(kind) in (list, tuple) and arguments:
            yield from zip(value, arguments if len(arguments) > 1 else repeat(arguments[0]))


def unusable(value: Any, depth: int = 0) -> str | None:
    """Return why a value is wrong although its type allows it; None if it is right.

    That is, outside of inner models: keys that are not text, text that is not Unicode, numbers in a list or mapping
    that are not finite or have more than 64 bits, and nesting without end.
    """
    if depth > DEEPEST:
        return f"must not have more than {DEEPEST} levels"
    if isinstance(value, (str, Path)) and _SURROGATE.search(str(value)):
        return "must be Unicode text, without halves of surrogate pairs"
    if depth > 0 and isinstance(value, float) and not math.isfinite(value):
        return "must hold finite numbers only"
    if depth > 0 and isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "must hold integers of 64 bits only"
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                return f"has the key {key!r:.40}, which is not text; put it in quotes"
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    else:
        return None
    return next((problem for item in inner if (problem := unusable(item, depth + 1))), None)


def out_of_range(value: Any, metadata: Any) -> str | None:
    """Return why an integer (or one of a list) is too large, if its field sets no upper bound; None if none is."""
    if any(isinstance(item, (Le, Lt)) for item in metadata):
        return None
    integers = [item for item in (value if isinstance(value, (list, tuple)) else [value]) if type(item) is int]
    if all(abs(item) <= LARGEST_INTEGER for item in integers):
        return None
    return f"must be at most {LARGEST_INTEGER} (2³¹ − 1)"
