"""What rows give to the chat template besides messages: tools, and variables of the template."""

from __future__ import annotations

import json
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import DataError
from rlcore_recipes.data.chat import without_nulls
from rlcore_recipes.data.columns import Row
from rlcore_recipes.data.settings import TEMPLATE_ARGUMENTS

TOOLS, ARGUMENTS = "tools", "chat_template_kwargs"
RENDERED = (TOOLS, ARGUMENTS)
"""Columns that TRL gives to the chat template, row by row."""


def template_variables(row: Row, where: str, padded: bool) -> dict[str, Any]:
    """Return the variables of a row for the chat template: its tools, and those in ``chat_template_kwargs``.

    Both may be JSON text, which keeps Parquet from giving every tool the fields of all others.

    Args:
        padded: leave null fields out (see `DataFile.padded`).

    Raises:
        DataError: they have another type, or set what rlcore sets.
    """
    tools = _value(row.get(TOOLS), f"{where}: column {TOOLS!r}", padded)
    arguments = _value(row.get(ARGUMENTS), f"{where}: column {ARGUMENTS!r}", padded)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{where}: column {TOOLS!r} must hold a list of tools (JSON schemas), not {tools!r:.100}")
    if arguments is not None and not isinstance(arguments, dict):
        raise DataError(f"{where}: column {ARGUMENTS!r} must hold variables by name, not {arguments!r:.100}")
    for name in TEMPLATE_ARGUMENTS:
        if name in (arguments or {}):
            raise DataError(f"{where}: column {ARGUMENTS!r} has {name!r}, which rlcore sets; remove it")
    return {**(arguments or {}), **({TOOLS: tools} if tools else {})}


def _value(value: Any, where: str, padded: bool) -> Any:
    if isinstance(value, str):
        with boundary(f"{where} is not JSON"):
            return json.loads(value) if value.strip() else None
    return without_nulls(value) if padded else value
