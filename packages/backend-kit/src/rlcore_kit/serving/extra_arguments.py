"""Checks of the arguments that a user passes through to an inference engine."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches


def problems_of(
    extra: Iterable[str],
    *,
    known: Collection[str],
    reserved: Mapping[str, str],
    settings: Collection[str],
    section: str,
    engine: str,
    help_command: str,
) -> list[str]:
    """Return what is wrong with the names in ``extra``, one sentence each.

    Args:
        known: arguments of the installed version.
        reserved: arguments that rlcore sets, with the reason.
        settings: arguments that are fields of the settings ``section``.
        engine: name of the engine in messages.
        help_command: lists the engine's arguments.
    """
    problems = []
    for name in extra:
        if name in reserved:
            problems.append(f"{name} cannot be set: {reserved[name]}")
        elif name in settings:
            problems.append(f"{name} is a setting: set {section}.{name} instead of args.{name}")
        elif name not in known:
            close = get_close_matches(name, sorted(known), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"see `{help_command}` for its arguments"
            problems.append(f"the installed {engine} has no argument {name}; {hint}")
    return problems
