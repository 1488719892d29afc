"""Assignments of a shell script: ``NAME=value``, ``NAME+=…`` and arrays."""

from __future__ import annotations

from tree_sitter import Node

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.shell.state import Source, State
from rlcore_recipes.from_verl.shell.words import Expander, Substitution
from rlcore_recipes.from_verl.word import Unknown, Word

LONGEST_VALUE = 1 << 17
"""The most characters of a variable; Linux passes no longer ones to a program."""
MOST_WORDS = 10_000
"""The most words of an array."""


def assign(node: Node, source: Source, state: State, substitute: Substitution) -> None:
    """Set the variable of the assignment ``node``; a value that is not known becomes `Unknown`.

    Raises:
        ConfigError: it adds text to an array.
    """
    target, value = node.children[0], node.children[2] if len(node.children) > 2 else None
    name, adds = source.of(target), node.children[1].type == "+="
    place = source.place(node)
    if target.type == "subscript":
        name = source.of(target.children[0])
        state.variables[name] = Unknown(f"{place}: {name} is set element by element, which is not read")
        return
    old = state.variables.get(name)
    expander = Expander(source, state, substitute)
    if value is not None and value.type == "array":
        words = expander.words(child for child in value.children if child.type not in ("(", ")", "comment"))
        before = old if isinstance(old, list) else [Word(old, place)] if old is not None else []
        found = [*before, *words] if adds else words
        state.variables[name] = found if len(found) <= MOST_WORDS else Unknown(f"{place}: {name} has too many words")
        return
    if adds and isinstance(old, list):
        raise ConfigError(f"{place}: {name}+= adds text to the first word of an array; write {name}+=(…)")
    try:
        text = expander.text(value)
    except Unknown as reason:
        state.variables[name] = reason
        return
    if adds and isinstance(old, Unknown):
        return
    text = f"{old or ''}{text}" if adds else text
    state.variables[name] = text if len(text) <= LONGEST_VALUE else Unknown(f"{place}: {name} is too long")
