"""What a shell script has set while it is read: variables, positional arguments, functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tree_sitter import Node

from rlcore_recipes.from_verl.launch import Launch
from rlcore_recipes.from_verl.word import Unknown, Word

Value = str | Unknown | list[Word]


@dataclass
class State:
    """What commands read and change.

    Attributes:
        variables: text, the words of an array, or why the value is not known.
        arguments: ``$1``, ``$2`` …
        functions: bodies by name.
        folder: the working directory, which ``cd`` changes; None if it is not known.
        where: source text and its name, for each file that is being read; the innermost last.
    """

    variables: dict[str, Value]
    arguments: list[Word]
    folder: str | None
    script: str
    functions: dict[str, tuple[Node, Source]] = field(default_factory=dict)

    def copy(self) -> State:
        """Return the state of a subshell."""
        return State(dict(self.variables), list(self.arguments), self.folder, self.script, dict(self.functions))


@dataclass(frozen=True)
class Source:
    """The text of a script, and the name that messages give it.

    Attributes:
        first_line: number of the text's first line in the file.
    """

    name: str
    text: bytes
    first_line: int = 1

    def place(self, node: Node) -> str:
        """Return the file and line of ``node``."""
        return f"{self.name}:{node.start_point[0] + self.first_line}"

    def of(self, node: Node) -> str:
        """Return the text of ``node``."""
        return self.between(node.start_byte, node.end_byte)

    def between(self, start: int, end: int) -> str:
        """Return the text from byte ``start`` to before ``end``."""
        return self.text[start:end].decode()


@dataclass(frozen=True)
class Script:
    """What was found in a script.

    Attributes:
        launch: the command of verl.
        folder: the working directory in which the script starts it; None if it is not known.
        variables: the environment of the command.
    """

    launch: Launch
    folder: str | None
    variables: Mapping[str, str]


def initial_state(environment: Mapping[str, str], arguments: Sequence[str], script: str, folder: str) -> State:
    """Return the state in which bash starts a script."""
    words = [Word(text, f"argument {number} of {script}") for number, text in enumerate(arguments, start=1)]
    return State({"PWD": folder, **environment, "BASH_SOURCE": script}, words, folder, script)
