"""Commands of bash itself that change what a script has set."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from rlcore_recipes.from_verl.shell.state import State
from rlcore_recipes.from_verl.word import Unknown, Word


class End(Exception):
    """The end of a script, function or loop.

    Attributes:
        kind: ``exit``, ``return``, ``break`` or ``continue``.
    """

    def __init__(self, kind: str, place: str) -> None:
        super().__init__(kind)
        self.kind, self.place = kind, place


def _cd(arguments: list[str], state: State) -> bool:
    target = next((argument for argument in arguments if not argument.startswith("-")), "~")
    if os.path.isabs(os.path.expanduser(target)):
        state.folder = os.path.normpath(os.path.expanduser(target))
    elif state.folder is not None:
        state.folder = os.path.normpath(os.path.join(state.folder, target))
    if state.folder is not None:
        state.variables["PWD"] = state.folder
    return True


def _shift(arguments: list[str], state: State) -> bool:
    count = int(arguments[0]) if arguments and arguments[0].isdigit() else 1
    if count > len(state.arguments):
        return False
    del state.arguments[:count]
    return True


def _set(arguments: list[str], state: State) -> bool:
    if "--" in arguments:
        state.arguments[:] = [Word(text, "") for text in arguments[arguments.index("--") + 1 :]]
    return True


def _read(arguments: list[str], state: State) -> bool:
    for name in arguments:
        if re.fullmatch(r"[A-Za-z_]\w*", name):
            state.variables[name] = Unknown(f"{name} is read while the script runs; give --env {name}=VALUE")
    return True


def _end(kind: str) -> Callable[[list[str], State, str], bool]:
    def end(arguments: list[str], state: State, place: str) -> bool:
        raise End(kind, place)

    return end


def _changes(change: Callable[[list[str], State], bool]) -> Callable[[list[str], State, str], bool]:
    return lambda arguments, state, place: change(arguments, state)


BUILTINS: dict[str, Callable[[list[str], State, str], bool]] = {
    "cd": _changes(_cd),
    "pushd": _changes(_cd),
    "shift": _changes(_shift),
    "set": _changes(_set),
    "read": _changes(_read),
    "mapfile": _changes(_read),
    "readarray": _changes(_read),
    **{kind: _end(kind) for kind in ("exit", "return", "break", "continue")},
}
"""Name → function of the arguments, the state and the place; it returns whether the command succeeds."""
