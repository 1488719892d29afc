"""The syntax tree of a shell script, as tree-sitter's grammar of bash makes it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import tree_sitter_bash
from tree_sitter import Language, Node, Parser

from rlcore_recipes.from_verl.shell.state import Source

_SIMPLE = ("command", "test_command", "variable_assignment", "declaration_command", "redirected_statement")
_NO_ARGUMENTS = ("variable_assignment", "file_redirect", "herestring_redirect", "comment")


@cache
def _parser() -> Parser:
    return Parser(Language(tree_sitter_bash.language()))


def parse(source: Source) -> Node:
    """Return the root of the tree of ``source``; what the grammar does not have is a node with an error."""
    return _parser().parse(source.text).root_node


def wrong(node: Node) -> bool:
    """Return whether the statement ``node`` itself, not one within it, is none of the grammar."""
    parts = node.children if node.has_error else []
    return (
        node.is_error or any(part.is_error or part.is_missing for part in parts) or bool(parts and node.type in _SIMPLE)
    )


def command_nodes(node: Node) -> list[Node]:
    """Return the name and the arguments of a command."""
    return [
        child.children[0] if child.type == "command_name" else child
        for child in node.children
        if child.type not in _NO_ARGUMENTS
    ]


def inside(node: Node) -> Iterator[Node]:
    """Yield ``node`` and every node in it."""
    yield node
    for child in node.children:
        yield from inside(child)


def first_error(node: Node) -> Node:
    """Return the innermost first node that the grammar does not have."""
    for child in node.children:
        if child.has_error or child.is_missing:
            return child if child.is_error or child.is_missing else first_error(child)
    return node


def words_behind_redirection(node: Node) -> Node | None:
    """Return a redirection that words follow, which the grammar counts to its target; None if there is none."""
    for redirect in (child for child in node.children if child.type == "file_redirect"):
        if len([child for child in redirect.children if child.is_named and child.type != "file_descriptor"]) > 1:
            return redirect
    return None


def split_branch(node: Node) -> tuple[list[Node], list[Node]]:
    """Return condition and body of ``if``, ``elif`` or ``else``."""
    children = [child for child in node.children if child.type not in ("elif_clause", "else_clause")]
    if node.type == "else_clause":
        return [], children[1:]
    then = next(index for index, child in enumerate(children) if child.type == "then")
    return [child for child in children[1:then] if child.is_named], children[then + 1 :]
