"""Conditions of a shell script: ``[ … ]``, ``[[ … ]]``, ``test …`` and ``(( … ))``."""

from __future__ import annotations

import fnmatch
import operator
import os
import re
from collections.abc import Callable
from pathlib import Path

from tree_sitter import Node

from rlcore_recipes.from_verl.shell.state import Source, State
from rlcore_recipes.from_verl.shell.words import Expander, Substitution
from rlcore_recipes.from_verl.word import Unknown

_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq,
    "-ne": operator.ne,
    "-lt": operator.lt,
    "-le": operator.le,
    "-gt": operator.gt,
    "-ge": operator.ge,
}
_FILES: dict[str, Callable[[Path], bool]] = {
    "-e": Path.exists,
    "-f": Path.is_file,
    "-d": Path.is_dir,
    "-h": Path.is_symlink,
    "-L": Path.is_symlink,
    "-s": lambda path: path.is_file() and path.stat().st_size > 0,
    "-r": lambda path: os.access(path, os.R_OK),
    "-w": lambda path: os.access(path, os.W_OK),
    "-x": lambda path: os.access(path, os.X_OK),
}
_Found = str | bool


class Conditions:
    """Decides conditions; an unset variable is empty in them, as it is for bash."""

    def __init__(self, source: Source, state: State, substitute: Substitution) -> None:
        self.source, self.state = source, state
        self.expander = Expander(source, state, substitute, empty=True)

    def holds(self, node: Node) -> bool:
        """Return whether the test command ``node`` succeeds.

        Raises:
            Unknown: it depends on something that is not known.
        """
        if node.children[0].type == "((":
            return self.expander.arithmetic(node) != 0
        inner = node.children[1:-1]
        return bool(inner) and all(self._value(child) for child in inner)

    def holds_words(self, words: list[str]) -> bool:
        """Return whether ``test`` with these words succeeds.

        Raises:
            Unknown: a form of more than one comparison.
        """
        match words:
            case []:
                return False
            case [text]:
                return bool(text)
            case ["!", *rest]:
                return not self.holds_words(rest)
            case [operation, text] if operation in ("-z", "-n") or operation in _FILES:
                return self._unary(operation, text)
            case [left, operation, right]:
                return self._compared(left, operation, right, False)
        raise Unknown(f"the test {' '.join(words)} is not read")

    def _value(self, node: Node) -> _Found:
        match node.type:
            case "parenthesized_expression":
                return all(self._value(child) for child in node.children[1:-1])
            case "unary_expression":
                mark, operand = node.children[0], node.children[-1]
                if self.source.of(mark) == "!":
                    return not self._value(operand)
                return self._unary(self.source.of(mark), self.expander.text(operand))
            case "binary_expression":
                return self._binary(node)
        return self.expander.text(node)

    def _binary(self, node: Node) -> bool:
        left, right = node.children[0], node.children[-1]
        operation = self.source.between(left.end_byte, right.start_byte).strip()
        if operation in ("&&", "-a"):
            return bool(self._value(left)) and bool(self._value(right))
        if operation in ("||", "-o"):
            return bool(self._value(left)) or bool(self._value(right))
        pattern = right.type not in ("string", "raw_string")
        if pattern and right.type in ("regex", "extglob_pattern"):
            return self._compared(self.expander.text(left), operation, self.source.of(right), True)
        return self._compared(self.expander.text(left), operation, self.expander.text(right), pattern)

    def _unary(self, operation: str, text: str) -> bool:
        if operation in ("-z", "-n"):
            return (text == "") == (operation == "-z")
        if operation == "-v":
            return text in self.state.variables
        if operation in _FILES:
            if self.state.folder is None and not os.path.isabs(text):
                raise Unknown(f"the working directory is not known where {operation} {text} is tested")
            try:
                return bool(text) and _FILES[operation](Path(self.state.folder or "/", text))
            except OSError:
                return False
        raise Unknown(f"the test {operation} is not read")

    def _compared(self, left: str, operation: str, right: str, pattern: bool) -> bool:
        if operation in _NUMBERS:
            try:
                return _NUMBERS[operation](int(left or "0"), int(right or "0"))
            except ValueError:
                raise Unknown(f"the test {left} {operation} {right} does not compare integers") from None
        match operation:
            case "=" | "==":
                return fnmatch.fnmatchcase(left, right) if pattern else left == right
            case "!=":
                return not fnmatch.fnmatchcase(left, right) if pattern else left != right
            case "<":
                return left < right
            case ">":
                return left > right
            case "=~":
                try:
                    return re.search(right if pattern else re.escape(right), left) is not None
                except re.error:
                    raise Unknown(f"the expression {right} is not read") from None
        raise Unknown(f"the test {operation} is not read")
