"""Words of a shell script: quotes, parameters, arrays and arithmetic, expanded as bash does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from tree_sitter import Node

from rlcore_recipes.from_verl.shell.arithmetic import compute
from rlcore_recipes.from_verl.shell.parameters import changed
from rlcore_recipes.from_verl.shell.state import Source, State, Value
from rlcore_recipes.from_verl.word import Unknown, Word

_BRACES = re.compile(r"(?<![$\\])\{[^{}]*(?:,|\.\.)[^{}]*\}")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "e": "\x1b", "f": "\f", "v": "\v"}


class Substitution(Protocol):
    """Returns what ``$(…)`` prints, or raises `Unknown`."""

    def __call__(self, node: Node, source: Source, state: State) -> str: ...


@dataclass(frozen=True)
class _Part:
    """A piece of a word.

    Attributes:
        split: whether blanks in it separate words: it comes from an expansion without quotes.
        breaks: whether a word ends before it: it is a further element of an array.
        place: where an element of an array was written; empty otherwise.
    """

    text: str | Unknown
    split: bool = False
    breaks: bool = False
    place: str = ""


class Expander:
    """Expands the words of one source with the variables of a state.

    Args:
        empty: whether an unset variable is empty, as in tests, instead of unknown.
    """

    def __init__(self, source: Source, state: State, substitute: Substitution, empty: bool = False) -> None:
        self.source, self.state, self.substitute, self.empty = source, state, substitute, empty

    def words(self, nodes: Iterable[Node]) -> list[Word]:
        """Return the words that the nodes of a command line expand to."""
        return [word for group in self._joined(nodes) for word in self._word(group)]

    def text(self, node: Node | None) -> str:
        """Return ``node`` as the value of a variable: nothing is split.

        Raises:
            Unknown: a part of it is not known.
        """
        if node is None:
            return ""
        parts = self._parts(node, quoted=False)
        found = "".join(_known(part.text) if not part.breaks else f" {_known(part.text)}" for part in parts)
        return self._at_home(found, node)

    def _at_home(self, text: str, node: Node) -> str:
        """Expand ``~`` where ``node``, which expands to ``text``, begins with it; also behind ``NAME=``."""
        home = self.state.variables.get("HOME")
        begins = re.match(r"((?:[A-Za-z_]\w*=)?)~(?=/|$)", self.source.of(node))
        if begins is None or not isinstance(home, str) or node.type not in ("word", "concatenation"):
            return text
        return f"{begins[1]}{home}{text[begins.end() :]}"

    def _joined(self, nodes: Iterable[Node]) -> Iterator[list[Node]]:
        """Group the nodes that only a line continuation without a blank separates: bash reads them as one word."""
        group: list[Node] = []
        for node in nodes:
            between = self.source.between(group[-1].end_byte, node.start_byte) if group else ""
            if group and not re.fullmatch(r"(?:\\\n)*", between):
                yield group
                group = []
            group.append(node)
        if group:
            yield group

    def _check_around(self, group: list[Node]) -> None:
        """Check that no escaped blank stands next to a word, which the grammar leaves out.

        Raises:
            Unknown: one does.
        """
        before, after = self.source.text[: group[0].start_byte], self.source.text[group[-1].end_byte :]
        if re.search(rb"(?<!\\)(?:\\\\)*\\[ \t]+\Z", before[-40:]) or re.match(rb"\\[^\n]", after[:2]):
            raise self._unknown(group[0], "has an escaped blank next to it, which is not read")

    def _word(self, group: list[Node]) -> list[Word]:
        place = self.source.place(group[0])
        literal = "".join(self.source.of(node) for node in group if node.type in ("word", "concatenation"))
        bare = re.sub(r"'[^']*'|\"(?:[^\"\\]|\\.)*\"|\$\{[^}]*\}|\\.", "", literal, flags=re.DOTALL)
        if any(node.type == "brace_expression" for node in group) or _BRACES.search(bare):
            reason = f"{place}: bash makes several words of {_shortened(literal)}; put the braces in quotes"
            return [Word(Unknown(reason), place)]
        try:
            self._check_around(group)
            parts = [part for node in group for part in self._parts(node, quoted=False)]
        except Unknown as reason:
            return [Word(reason, place)]
        if parts and group[0].type in ("word", "concatenation") and isinstance(parts[0].text, str):
            parts[0] = replace(parts[0], text=self._at_home(parts[0].text, group[0]))
        return list(_fields(parts, place))

    def _parts(self, node: Node, quoted: bool) -> list[_Part]:
        text = self.source.of(node)
        kind = node.type
        if kind == "raw_string":
            return [_Part(text if quoted else text[1:-1])]
        if kind == "ansi_c_string":
            return [
                _Part(re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), text[2:-1], flags=re.DOTALL))
            ]
        if kind in ("string", "translated_string"):
            empty = [] if any(child.is_named for child in node.children) else [_Part("")]
            return [*empty, *self._pieces(node.children, node.start_byte, node.end_byte, True)]
        if kind == "concatenation":
            for left, right in pairwise(node.children):
                if re.search(r"(?<!\\)[ \t]", self.source.between(left.end_byte, right.start_byte)):
                    raise self._unknown(node, "is not read")  # brackets between blanks, which the grammar joins
            return self._pieces(node.children, node.start_byte, node.end_byte, quoted)
        if kind == "simple_expansion":
            return self._parameter(text.lstrip()[1:], node, quoted)
        if kind == "expansion":
            return self._expansion(node, quoted)
        if kind == "arithmetic_expansion":
            return [_Part(str(self.arithmetic(node)), split=not quoted)]
        if kind == "command_substitution":
            return [_Part(self.substitute(node, self.source, self.state), split=not quoted)]
        if kind in ("process_substitution", "brace_expression"):
            raise self._unknown(node, "is not run")
        return [_Part(_unescaped(text, quoted))]

    def _pieces(self, children: Iterable[Node], start: int, end: int, quoted: bool) -> list[_Part]:
        """Expand ``children`` and take what stands between them as it is."""
        parts: list[_Part] = []
        for child in children:
            if child.start_byte > start:
                parts.append(_Part(_unescaped(self.source.between(start, child.start_byte), quoted)))
            text = self.source.of(child)
            if child.type.endswith(("expansion", "substitution", '"')) and text[:1].isspace():
                # the grammar counts blanks before it in
                parts.append(_Part(text[: len(text) - len(text.lstrip())]))
            if child.type not in ('"', '$"'):
                parts += self._parts(child, quoted)
            start = child.end_byte
        if end > start:
            parts.append(_Part(_unescaped(self.source.between(start, end), quoted)))
        return parts

    def _expansion(self, node: Node, quoted: bool) -> list[_Part]:
        """Expand ``${…}``."""
        children = node.children[1:-1]
        prefix = children.pop(0).type if children and children[0].type in ("#", "!") and len(children) > 1 else ""
        if not children:
            raise self._unknown(node, "is not read")
        name, *rest = children
        if prefix == "!" and name.type == "variable_name" and not rest:
            return self._parameter(self._value_text(self.source.of(name), node), node, quoted)
        if prefix == "#":
            return [_Part(str(self._length(name, node)))]
        if prefix:
            raise self._unknown(node, "is not read")
        operator = rest[0].type if rest else ""
        begin = rest[0].end_byte if rest else 0
        argument = [] if not rest else self._pieces(rest[1:], begin, node.children[-1].start_byte, quoted)
        if not quoted:
            argument = [replace(part, split=True) for part in argument]
        if argument and rest[1:] and not quoted and isinstance(argument[0].text, str):
            argument[0] = replace(argument[0], text=self._at_home(argument[0].text, rest[1]))
        if name.type == "subscript" or self.source.of(name) in ("@", "*"):
            return self._several(name, operator, argument, node, quoted)
        return self._operated(self.source.of(name), operator, argument, node, quoted)

    def _several(self, name: Node, operator: str, argument: list[_Part], node: Node, quoted: bool) -> list[_Part]:
        """Expand ``${ARRAY[@]…}`` and ``${@…}``."""
        array = name.type == "subscript"
        found = self._element(name, node, quoted) if array else self._parameter(self.source.of(name), node, quoted)
        if not operator:
            return found
        if operator in (":-", "-"):
            return found or argument
        if operator in (":+", "+"):
            return argument if found else []
        bounds = "".join(_known(part.text) for part in argument)
        slices = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", bounds) if operator == ":" else None
        if slices is None or (not array and int(slices[1]) == 0):
            raise self._unknown(node, "is not read")
        start = int(slices[1]) - (0 if array else 1)
        chosen = found[start : None if slices[2] is None else start + int(slices[2])]
        return [replace(part, breaks=index > 0) for index, part in enumerate(chosen)]

    def _operated(self, name: str, operator: str, argument: list[_Part], node: Node, quoted: bool) -> list[_Part]:
        given = self._lookup(name)
        if operator in (":-", "-", ":=", "=", ":?", "?", ":+", "+"):
            missing = given is None or (operator[0] == ":" and given == "")
            if operator in (":+", "+"):
                return [_Part("", split=not quoted)] if missing else argument
            if not missing:
                return self._parameter(name, node, quoted)
            if operator in (":?", "?"):
                raise Unknown(f"{self.source.place(node)}: {name} is not set; give --env {name}=VALUE")
            if operator in (":=", "="):
                self.state.variables[name] = "".join(_known(part.text) for part in argument)
            return argument or [_Part("", split=not quoted)]
        text = self._value_text(name, node)
        if operator:
            new = changed(text, operator, "".join(_known(part.text) for part in argument))
            if new is None:
                raise self._unknown(node, "is not read")
            text = new
        return [_Part(text, split=not quoted)]

    def _parameter(self, name: str, node: Node, quoted: bool) -> list[_Part]:
        if name in ("@", "*"):
            arguments = self.state.arguments
            if name == "*" and quoted:
                return [_Part(" ".join(word.known() for word in arguments))]
            return _elements(arguments, quoted)
        return [_Part(self._value_text(name, node), split=not quoted)]

    def _element(self, subscript: Node, node: Node, quoted: bool) -> list[_Part]:
        """Expand ``${ARRAY[…]}``."""
        name, index = self.source.of(subscript.children[0]), self.source.of(subscript.children[2])
        value = self._lookup(name)
        if isinstance(value, Unknown):
            raise value
        if value is None:
            return [] if index in ("@", "*") else [_Part(self._value_text(name, node), split=not quoted)]
        words = value if isinstance(value, list) else [Word(value, "")]
        if index in ("@", "*"):
            if index == "*" and quoted:
                return [_Part(" ".join(word.known() for word in words))]
            return _elements(words, quoted)
        position = self._computed(index, node)
        if not -len(words) <= position < len(words):
            return [_Part("")]
        return [_Part(words[position].known(), split=not quoted)]

    def _length(self, name: Node, node: Node) -> int:
        if name.type == "subscript":
            value = self._lookup(self.source.of(name.children[0]))
            if isinstance(value, Unknown):
                raise value
            return len(value) if isinstance(value, list) else int(value is not None)
        return len(self._value_text(self.source.of(name), node))

    def arithmetic(self, node: Node) -> int:
        """Compute ``$((…))`` or ``((…))``.

        Raises:
            Unknown: it reads an unknown variable, or cannot be computed.
        """
        pieces, start = [], node.start_byte
        for inner in _expansions(node):
            pieces.append(self.source.between(start, inner.start_byte))
            pieces.append("".join(_known(part.text) for part in self._parts(inner, True)))
            start = inner.end_byte
        text = "".join([*pieces, self.source.between(start, node.end_byte)]).strip()
        text = text.removeprefix("$").removeprefix("((").removesuffix("))")
        return self._computed(text, node)

    def _computed(self, text: str, node: Node) -> int:
        try:
            return compute(text, lambda name: self._value_text(name, node))
        except ValueError as error:
            raise Unknown(f"{self.source.place(node)}: {_shortened(self.source.of(node))}: {error}") from None

    def _value_text(self, name: str, node: Node) -> str:
        value = self._lookup(name)
        if value is None and self.empty:
            return ""
        if value is None:
            where = self.source.place(node)
            if name.isdigit():
                raise Unknown(f"{where}: the script's argument ${name} is not given; write it after --")
            if not re.fullmatch(r"\w+", name):
                raise Unknown(f"{where}: ${name} is only known while the script runs")
            raise Unknown(f"{where}: {name} is not set; give --env {name}=VALUE")
        return _known(self._scalar(value))

    def _scalar(self, value: Value) -> str | Unknown:
        if isinstance(value, list):
            return value[0].text if value else ""
        return value

    def _lookup(self, name: str) -> Value | None:
        if name == "#":
            return str(len(self.state.arguments))
        if name in ("@", "*"):
            return " ".join(word.known() for word in self.state.arguments) if self.state.arguments else None
        if name == "0":
            return self.state.script
        if name.isdigit():
            return self.state.arguments[int(name) - 1].text if int(name) <= len(self.state.arguments) else None
        return self.state.variables.get(name)

    def _unknown(self, node: Node, what: str) -> Unknown:
        return Unknown(f"{self.source.place(node)}: {_shortened(self.source.of(node))} {what}; write its value")


def _elements(words: Sequence[Word], quoted: bool) -> list[_Part]:
    """Return each word of an array as a word."""
    return [_Part(word.text, not quoted, index > 0, word.place) for index, word in enumerate(words)]


def _expansions(node: Node) -> Iterator[Node]:
    for child in node.children:
        if child.type in ("simple_expansion", "expansion", "command_substitution"):
            yield child
        else:
            yield from _expansions(child)


def _fields(parts: Iterable[_Part], place: str) -> Iterator[Word]:
    """Make words of the parts of one."""
    texts: list[str] | None = None
    where = place
    for part in parts:
        if part.breaks and texts is not None:
            yield Word("".join(texts), where)
            texts, where = None, place
        where = part.place or where
        if isinstance(part.text, Unknown):
            yield Word(part.text, where)
            texts = None
            continue
        if not part.split:
            texts = [*(texts or []), part.text]
            continue
        pieces = re.split(r"[ \t\n]+", part.text)
        for index, piece in enumerate(pieces):
            if index > 0 and texts is not None:
                yield Word("".join(texts), where)
                texts = None
            if piece:
                texts = [*(texts or []), piece]
    if texts is not None:
        yield Word("".join(texts), where)


def _known(text: str | Unknown) -> str:
    if isinstance(text, Unknown):
        raise text
    return text


def _unescaped(text: str, quoted: bool) -> str:
    text = text.replace("\\\n", "")
    return re.sub(r'\\([$`"\\])', r"\1", text) if quoted else re.sub(r"\\(.)", r"\1", text)


def _escape(found: re.Match[str]) -> str:
    return _ESCAPES.get(found[1], found[1])


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
