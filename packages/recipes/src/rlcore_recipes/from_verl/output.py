"""A translation as a person reads it: YAML with a comment for each key, and what has no equivalent."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlcore.config import yaml_format
from rlcore_recipes.from_verl.assignment import Translation, Untranslated, VerlCommand
from rlcore_recipes.from_verl.translate import NOTHING_TO_SET

WIDTH = 80
"""Columns of comments and of the list of untranslated keys; YAML itself is as wide as its values are."""

MOST_IN_FULL = 60
"""Untranslated keys that are shown with value and place; of more, as in a complete configuration, the names alone."""

UNKNOWN, WITHOUT, FOLLOWED = "Keys that are not known", "Keys without an equivalent", "Keys that need no setting"
TITLES = (UNKNOWN, WITHOUT, FOLLOWED)
_SHORT = {UNKNOWN: "not known", WITHOUT: "without an equivalent", FOLLOWED: "without need of a setting"}


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
    below = [f"# {line}".rstrip() if line else "" for line in report(translation)]
    return "\n".join([*head, "", *body, *below]) + "\n"


def report(translation: Translation) -> list[str]:
    """Return lines that name every key that is not translated with its reason, and differences to know of."""
    groups: dict[str, list[Untranslated]] = {title: [] for title in TITLES}
    for item in translation.untranslated:
        groups[_title(item)].append(item)
    lines: list[str] = []
    for title, items in groups.items():
        if items:
            lines += ["", f"{title}:", *_items(items, brief=len(translation.untranslated) > MOST_IN_FULL)]
    if translation.notes:
        lines += ["", "Differences to know of:"]
        for note in translation.notes:
            lines += _wrapped(note, "- ", "  ")
    return lines


def summary(command: VerlCommand, translation: Translation) -> str:
    """Return one sentence with how many keys are translated, and how many are not."""
    latest = {assignment.key: assignment for assignment in command.assignments}
    titles = [_title(item) for item in translation.untranslated if item.assignment is latest.get(item.assignment.key)]
    translated = len(latest) - len(titles)
    rest = "".join(f", {titles.count(title)} {_SHORT[title]}" for title in TITLES if title in titles)
    return f"{len(latest)} keys of {command.entry} for the recipe {translation.recipe}: {translated} translated{rest}"


def _title(item: Untranslated) -> str:
    if not item.understood:
        return UNKNOWN
    return FOLLOWED if item.reason.startswith(NOTHING_TO_SET) else WITHOUT


def _items(items: Sequence[Untranslated], brief: bool) -> Iterator[str]:
    """Yield keys in the order in which they are given, those with one reason together.

    Args:
        brief: whether their names alone are shown, without value and place.
    """
    by_reason: dict[str, list[Untranslated]] = {}
    for item in items:
        by_reason.setdefault(item.reason, []).append(item)
    for reason, same in by_reason.items():
        if brief:
            yield from _wrapped(", ".join(item.assignment.key for item in same), "- ", "  ")
        else:
            yield from (f"- {_shown(item)}" for item in same)
        yield from _wrapped(reason.removeprefix(NOTHING_TO_SET).lstrip(": "), "    ", "    ")


def _shown(item: Untranslated) -> str:
    given = item.assignment
    value = "" if given.prefix == "~" else f"={yaml_format.shortened(yaml_format.inline(given.value), 30)}"
    return f"{given.prefix}{given.key}{value}  ({given.place})"


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH - 2, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def _section(values: Mapping[str, Any], path: str, comments: Mapping[str, str], depth: int = 0) -> Iterator[str]:
    """Yield the lines of a mapping; the comment of a key stands behind it, or above it where the line would be long."""
    indent = "  " * depth
    ordered = sorted(values, key=lambda key: (isinstance(values[key], Mapping), key != "name")) if depth else values
    for key in ordered:
        value = values[key]
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
