"""A translation as a person reads it: YAML with a comment for each key, and what has no equivalent."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlcore.config import yaml_format
from rlcore_recipes.from_verl.assignment import Translation, Untranslated

WIDTH = 80
"""Columns of comments and of the list of untranslated keys; YAML itself is as wide as its values are."""


def as_yaml(translation: Translation, command: str) -> str:
    """Return the configuration as YAML with comments, and below it what is not translated.

    Args:
        command: what it is a translation of, in words.
    """
    head = [
        *_comment(f"Recipe {translation.recipe}, translated from {command}."),
        f"# rlcore run {translation.recipe} --config THIS_FILE",
    ]
    body = list(_section(translation.config, "", translation.comments))
    return "\n".join([*head, "", *body, *_below(translation)]) + "\n"


def _below(translation: Translation) -> Iterator[str]:
    for line in report(translation):
        yield f"# {line}".rstrip()


def report(translation: Translation) -> list[str]:
    """Return lines that name every key without an equivalent, why it has none, and differences to know of."""
    lines: list[str] = []
    groups = (
        ("Keys that are not known as verl's:", [item for item in translation.untranslated if not item.understood]),
        ("Keys without an equivalent:", [item for item in translation.untranslated if item.understood]),
    )
    for title, items in groups:
        if items:
            lines += ["", title, *_items(items)]
    if translation.notes:
        lines += ["", "To know:"]
        for note in translation.notes:
            lines += textwrap.wrap(note, WIDTH - 2, initial_indent="- ", subsequent_indent="  ")
    return lines


def _items(items: Sequence[Untranslated]) -> Iterator[str]:
    """Yield keys in the order of their first, those with one reason together."""
    by_reason: dict[str, list[Untranslated]] = {}
    for item in items:
        by_reason.setdefault(item.reason, []).append(item)
    for reason, same in by_reason.items():
        for item in same:
            given = item.assignment
            value = "" if given.prefix == "~" else f"={yaml_format.shortened(yaml_format.inline(given.value), 30)}"
            yield f"- {given.prefix}{given.key}{value}  ({given.place})"
        yield from textwrap.wrap(
            reason, WIDTH - 2, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )


def _section(values: Mapping[str, Any], path: str, comments: Mapping[str, str], depth: int = 0) -> Iterator[str]:
    """Yield the lines of a mapping; the comment of a key stands behind it, or above it where the line would be long."""
    indent = "  " * depth
    for key, value in values.items():
        dotted = f"{path}{key}"
        name = yaml_format.inline(key)
        comment = comments.get(dotted, "")
        if isinstance(value, Mapping) and value:
            yield from _comment(comment, indent)
            yield f"{indent}{name}:"
            yield from _section(value, f"{dotted}.", comments, depth + 1)
            continue
        line = f"{indent}{name}: {yaml_format.inline(value)}"
        if not comment:
            yield line
        elif len(f"{line}  # {comment}") <= WIDTH:
            yield f"{line}  # {comment}"
        else:
            yield from _comment(comment, indent)
            yield line


def _comment(text: str, indent: str = "") -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=mark, subsequent_indent=mark, break_long_words=False, break_on_hyphens=False
    )
