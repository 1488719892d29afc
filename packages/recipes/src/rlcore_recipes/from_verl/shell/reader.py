"""Statements of a shell script, read in the order in which bash would run them. Nothing is run.

A value that only running the script would tell is `Unknown`, and so is what an undecided ``if`` sets. That is an error
where the command of verl needs it, and no matter elsewhere.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tree_sitter import Node

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.launch import Launch, find_launch, names_verl
from rlcore_recipes.from_verl.shell.assignments import assign
from rlcore_recipes.from_verl.shell.builtins import BUILTINS, End
from rlcore_recipes.from_verl.shell.conditions import Conditions
from rlcore_recipes.from_verl.shell.file import script_source
from rlcore_recipes.from_verl.shell.state import Script, Source, State
from rlcore_recipes.from_verl.shell.substitution import output
from rlcore_recipes.from_verl.shell.syntax import (
    command_nodes,
    first_error,
    inside,
    parse,
    split_branch,
    words_behind_redirection,
    wrong,
)
from rlcore_recipes.from_verl.shell.words import Expander
from rlcore_recipes.from_verl.word import Unknown, Word

_MOST_REPEATS = 1000
_DEEPEST = 100
_MOST_STATEMENTS = 20_000
_STRAY = re.compile(r"[+~]{0,2}[A-Za-z_]\w*(\.\w+)+=")


@dataclass
class Reader:
    """Reads statements in the order in which bash runs them."""

    state: State
    found: list[Script] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    reason: Unknown | None = None  # why the status of the last statement is not known
    depth: int = 0
    statements: int = 0

    def read(self, source: Source) -> str | None:
        """Read all of ``source``; return where it exits, None if it runs to its end."""
        try:
            self._all(parse(source).children, source)
        except End as end:
            return end.place if end.kind == "exit" else None
        return None

    def _all(self, nodes: Iterable[Node], source: Source) -> bool | None:
        status: bool | None = True
        for node in nodes:
            if node.is_named and node.type != "comment":
                status = self.run(node, source)
        return status

    def run(self, node: Node, source: Source) -> bool | None:
        """Read one statement; return whether it succeeds, None if only running it would tell."""
        self.depth += 1
        self.statements += 1
        try:
            if self.statements > _MOST_STATEMENTS:
                raise ConfigError(f"{source.place(node)}: the script runs more than {_MOST_STATEMENTS} statements")
            if self.depth > _DEEPEST:
                raise ConfigError(f"{source.place(node)}: statements are nested too deeply")
            return self._statement(node, source)
        finally:
            self.depth -= 1

    def _statement(self, node: Node, source: Source) -> bool | None:
        if wrong(node):
            place = source.place(first_error(node))
            if names_verl(source.of(node)):
                raise ConfigError(
                    f"{place}: bash would not read this: {source.of(node).strip().partition(chr(10))[0][:60]}"
                )
            self._not_read(node, source, Unknown(f"{place}: this is not read"))
            return None
        match node.type:
            case "command":
                return self._command(node, source)
            case "variable_assignment" | "variable_assignments" | "declaration_command":
                for child in [node] if node.type == "variable_assignment" else node.children:
                    if child.type == "variable_assignment":
                        assign(child, source, self.state, self.substitute)
                return True
            case "list":
                return self._list(node, source)
            case "if_statement":
                return self._if(node, source)
            case "case_statement":
                return self._case(node, source)
            case "for_statement" | "while_statement":
                return self._loop(node, source)
            case "test_command":
                return self._holds(node, source)
            case "negated_command":
                status = self.run(node.children[-1], source)
                return None if status is None else not status
            case "redirected_statement":
                return self._redirected(node, source)
            case "pipeline" | "subshell":
                return self._apart(node, source)
            case "compound_statement":
                if node.children[0].type == "((":
                    return self._arithmetic(node, source)
                return self._all(node.children, source)
            case "do_group" | "program":
                return self._all(node.children, source)
            case "unset_command":
                for child in node.children[1:]:
                    self.state.variables.pop(source.of(child), None)
                return True
            case "function_definition":
                name = next(child for child in node.children if child.type == "word")
                self.state.functions[source.of(name)] = (node.children[-1], source)
                return True
        self._not_read(node, source, Unknown(f"{source.place(node)}: this statement is not read"))
        return None

    def _redirected(self, node: Node, source: Source) -> bool | None:
        if (redirection := words_behind_redirection(node)) is not None and names_verl(source.of(node)):
            what = f"move {source.of(redirection)[:40]} to the end of the command"
            raise ConfigError(f"{source.place(redirection)}: {what}")
        return self.run(node.children[0], source) if node.children[0].is_named else True

    def _expander(self, source: Source) -> Expander:
        return Expander(source, self.state, self.substitute)

    def substitute(self, node: Node, source: Source, state: State) -> str:
        """Return what ``$(…)`` prints; see `Substitution`."""
        inner = [child for child in node.children if child.is_named]
        reader = _Printing(state.copy())
        try:
            reader._all(inner, source)
        except Unknown as reason:
            text = source.of(node)
            what = text if len(text) <= 60 else text[:59] + "…"
            raise Unknown(f"{source.place(node)}: {what} is not run ({_short(reason)})") from None
        return "".join(reader.printed).rstrip("\n")

    def _list(self, node: Node, source: Source) -> bool | None:
        """Read ``A && B`` or ``A || B``."""
        left, mark, right = node.children[0], node.children[1].type, node.children[2]
        status = self.run(left, source)
        if status is None and names_verl(source.of(right)):
            status = mark == "&&"  # what comes before the training is meant to succeed
        if status is None:
            self._not_read(
                right, source, Unknown(f"{source.place(left)}: whether {source.of(left)[:60]} succeeds is not known")
            )
            return None
        return self.run(right, source) if status == (mark == "&&") else status

    def _holds(self, node: Node, source: Source) -> bool | None:
        try:
            return Conditions(source, self.state, self.substitute).holds(node)
        except Unknown as reason:
            self.reason = reason
            return None

    def _arithmetic(self, node: Node, source: Source) -> bool | None:
        text = source.of(node)
        if found := re.fullmatch(r"\(\(\s*(\w+)\s*(\+\+|--|[-+*/]?=(?!=))\s*(.*?)\s*\)\)", text, re.DOTALL):
            self.state.variables[found[1]] = Unknown(
                f"{source.place(node)}: {text} is not computed; give --env {found[1]}=VALUE"
            )
            return True
        return self._holds(node, source)

    def _if(self, node: Node, source: Source) -> bool | None:
        branches = [node, *(child for child in node.children if child.type in ("elif_clause", "else_clause"))]
        for branch in branches:
            condition, body = split_branch(branch)
            self.reason = None
            status = self._all(condition, source) if condition else True
            if status is None:
                what = source.between(condition[0].start_byte, condition[-1].end_byte)
                why = f" ({self.reason})" if self.reason else ""
                reason = Unknown(f"{source.place(branch)}: whether {what[:60]} holds is not known{why}")
                self._not_read(node, source, reason)
                return None
            if status:
                return self._all(body, source)
        return True

    def _case(self, node: Node, source: Source) -> bool | None:
        try:
            text = Expander(source, self.state, self.substitute, empty=True).text(node.children[1])
        except Unknown as reason:
            self._not_read(node, source, reason)
            return None
        for item in (child for child in node.children if child.type == "case_item"):
            closing = next(index for index, child in enumerate(item.children) if child.type == ")")
            patterns = [
                self._pattern(child, source) for child in item.children[:closing] if child.type not in ("(", "|")
            ]
            if any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns):
                return self._all(item.children[closing + 1 :], source)
        return True

    def _pattern(self, node: Node, source: Source) -> str:
        if node.type in ("string", "raw_string", "concatenation", "simple_expansion", "expansion"):
            try:
                return self._expander(source).text(node)
            except Unknown:
                return source.of(node)
        return source.of(node)

    def _loop(self, node: Node, source: Source) -> bool | None:
        body = node.children[-1]
        try:
            for number, _ in enumerate(self._turns(node, source)):
                if number >= _MOST_REPEATS:
                    raise Unknown(f"{source.place(node)}: the loop repeats more than {_MOST_REPEATS} times")
                try:
                    self.run(body, source)
                except End as end:
                    if end.kind == "break":
                        break
                    if end.kind != "continue":
                        raise
        except Unknown as reason:
            self._not_read(node, source, reason)
            return None
        return True

    def _turns(self, node: Node, source: Source) -> Iterator[None]:
        """Yield before each turn of a loop, with its variable set."""
        if node.type == "for_statement":
            name = source.of(node.children[1])
            values = [child for child in node.children[3:-1] if child.is_named]
            for word in self._expander(source).words(values):
                self.state.variables[name] = word.known()
                yield
            return
        until = node.children[0].type == "until"
        while (status := self._all(node.children[1:-1], source)) is not until:
            if status is None:
                raise Unknown(f"{source.place(node)}: when this loop ends is not known")
            yield

    def _apart(self, node: Node, source: Source) -> bool | None:
        """Read commands that run in separate processes: their variables are lost."""
        kept = self.state
        self.state = kept.copy()
        try:
            return self._all(node.children, source)
        except End as end:
            if end.kind == "exit":
                return None
            raise
        finally:
            self.state = kept

    def _not_read(self, node: Node, source: Source, reason: Unknown) -> None:
        """Pass over a statement: what it would set is not known.

        Raises:
            ConfigError: it holds the command of verl.
        """
        for inner in inside(node):
            if inner.type == "variable_assignment":
                name = source.of(inner.children[0]).partition("[")[0]
                why = f"{source.place(inner)}: {name} is set there, but {reason}; give --env {name}=VALUE"
                self.state.variables[name] = Unknown(why)
            elif inner.type == "command" and inner.start_byte < inner.end_byte:
                words = self._expander(source).words(command_nodes(inner))
                if find_launch(words) is not None:
                    raise ConfigError(f"{reason}; the command of verl at {source.place(inner)} depends on it")
        return

    def _command(self, node: Node, source: Source) -> bool | None:
        state = self.state
        assigned = [child for child in node.children if child.type == "variable_assignment"]
        nodes = command_nodes(node)
        for child in assigned:
            if nodes and child.end_byte == nodes[0].start_byte:  # an escaped character ends the value in the grammar
                self._not_read(child, source, Unknown(f"{source.place(child)}: {source.of(child)[:60]} is not read"))
                return None
        words = self._expander(source).words(nodes)
        if not words:
            return True
        if (launch := find_launch(words)) is not None:
            self._launched(launch, assigned, source)
            return True
        if words[0].text in state.functions:
            return self._call(words[0].known(), words[1:])
        try:
            name, *arguments = [word.known() for word in words]
        except Unknown as reason:
            self._check_stray(words, source, node)
            self.reason = reason
            return None
        if name in BUILTINS:
            return BUILTINS[name](arguments, state, source.place(node))
        if name in ("source", ".") and arguments:
            return self._source(arguments[0], source, node)
        if name == "eval":
            return self._text(" ".join(arguments), source, node)
        if name in ("test", "["):
            return self._tested(arguments, source)
        self._check_stray(words, source, node)
        inner = next((index for index, word in enumerate(arguments) if re.fullmatch(r"-[lix]*c", word)), None)
        if inner is not None and {"bash", "sh"} & {name, *arguments[:inner]} and len(arguments) > inner + 1:
            return self._text(arguments[inner + 1], source, node)
        if script := next((word for word in [name, *arguments] if word.endswith(".sh")), None):
            self.others.append(f"{source.place(node)} runs the script {script}: give that one")
        try:
            return self.answered(*output([name, *arguments], state))
        except Unknown as reason:
            self.reason = reason
            return None

    def answered(self, text: str, status: bool) -> bool:
        """Take what a command prints."""
        return status

    def _launched(self, launch: Launch, assigned: list[Node], source: Source) -> None:
        state = self.state.copy()
        for child in assigned:
            assign(child, source, state, self.substitute)
        variables = {name: value for name, value in state.variables.items() if isinstance(value, str)}
        self.found.append(Script(launch, state.folder, variables))

    def _check_stray(self, words: list[Word], source: Source, node: Node) -> None:
        text = source.of(node)
        if _STRAY.match(text):
            raise ConfigError(
                f"{source.place(node)}: {text.split()[0][:60]} is no part of verl's command, which a comment or a line "
                "without a backslash at its end has ended before"
            )

    def _call(self, name: str, arguments: list[Word]) -> bool | None:
        body, source = self.state.functions[name]
        kept, self.state.arguments = self.state.arguments, arguments
        try:
            return self.run(body, source)
        except End as end:
            if end.kind != "return":
                raise
            return None
        finally:
            self.state.arguments = kept

    def _text(self, text: str, source: Source, node: Node) -> bool | None:
        """Read a text that bash would run."""
        inner = Source(source.name, text.encode(), node.start_point[0] + source.first_line)
        self.read(inner)
        return None

    def _source(self, name: str, source: Source, node: Node) -> bool | None:
        """Read a file that the script reads with ``source``."""
        path = Path(self.state.folder or "/", name)
        if not path.is_file() or self.depth > _DEEPEST // 2:
            self.others.append(f"{source.place(node)}: {name} is not read: there is no such file")
            return None
        try:
            self.read(script_source(path))
        except ConfigError:  # such as the activation of an environment: what it sets is not known
            return None
        return True

    def _tested(self, words: list[str], source: Source) -> bool | None:
        try:
            return Conditions(source, self.state, self.substitute).holds_words([word for word in words if word != "]"])
        except Unknown as reason:
            self.reason = reason
            return None


class _Printing(Reader):
    """Reads the commands of ``$(…)`` and keeps what they print."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.printed: list[str] = []

    def answered(self, text: str, status: bool) -> bool:
        self.printed.append(f"{text}\n" if text else "")
        return status

    def run(self, node: Node, source: Source) -> bool | None:
        """Read one statement.

        Raises:
            Unknown: only running it would tell.
        """
        self.reason = None
        if node.type == "pipeline":
            raise Unknown("a pipeline is not run")
        status = super().run(node, source)
        if status is None:
            raise self.reason or Unknown("it is not run")
        return status


def _short(reason: Unknown) -> str:
    return str(reason).rpartition(": ")[2]
