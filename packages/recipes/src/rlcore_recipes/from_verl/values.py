"""Values of verl's keys as numbers, switches and lists."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from rlcore.errors import ConfigError


def number(value: Any, name: str) -> int | float:
    """Return ``value``, which has to be a number.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, str):
        with suppress(ValueError):
            value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name}: {value!r} is not a number")
    return value


def whole(value: Any, name: str) -> int:
    """Return ``value``, which has to be a whole number.

    Raises:
        ConfigError: it is not.
    """
    found = number(value, name)
    if not math.isfinite(found) or found != int(found):
        raise ConfigError(f"{name}: {value!r} is not a whole number")
    return int(found)


def flag(value: Any) -> bool:
    """Return whether ``value`` is true, as verl reads it."""
    return value.strip().lower() in ("true", "1", "yes", "on") if isinstance(value, str) else bool(value)


def as_list(value: Any) -> list[Any]:
    """Return ``value`` as a list: of itself, if it is none."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
