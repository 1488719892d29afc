"""Hydra's override grammar: ``key=value``, ``+key=``, ``++key=``, ``~key``, and values as Hydra reads them.

hydra-core itself pins one version of the ANTLR runtime, which other packages need in another version; the tests compare
this parser with it. What Hydra refuses is refused here too, with a reason.
"""

from __future__ import annotations

import re
from typing import Any

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.assignment import Assignment

_OVERRIDE = re.compile(
    r"(?P<prefix>\+\+|\+|~|)(?P<key>[\w$.-]+(?:/[\w$.-]+)*(?:@[\w$.:-]*)?)(?:(?P<set>=)(?P<value>.*))?", re.DOTALL
)
_FLOAT = re.compile(
    r"[-+]?(?:(?:(?:0|[1-9](?:_?\d)*)?\.\d(?:_?\d)*|(?:0|[1-9](?:_?\d)*)\.?)(?:[eE][-+]?\d(?:_?\d)*)?|inf|nan)",
    re.IGNORECASE,
)
_INT = re.compile(r"[-+]?(?:0|[1-9](?:_?\d)*)")
_WORDS = {"null": None, "true": True, "false": False}
_UNQUOTED = re.compile(r"[A-Za-z0-9_/\\+.$%*@?|:\- \t]")
_ESCAPABLE = "\\()[]{}:=, \t"
_INTERPOLATION = re.compile(r"\$\{[^}]+\}")
_FUNCTION = re.compile(r"([A-Za-z_][\w-]*)\(")
_SWEEPS = ("choice", "range", "interval", "glob", "sort", "shuffle", "tag")


def parse_override(text: str, place: str) -> Assignment:
    """Parse one argument of a command that Hydra reads.

    Args:
        place: where it stands, for messages and for the assignment.

    Raises:
        ConfigError: it is no override, or Hydra would refuse its value.
    """
    found = _OVERRIDE.fullmatch(text)
    if found is None or not (found["set"] or found["prefix"] == "~"):
        raise ConfigError(f"{place}: {_shortened(text)!r} is no Hydra override; one is written key=value")
    value = parse_value(found["value"], f"{place}: {found['key']}") if found["set"] else None
    return Assignment(found["key"], value, found["prefix"], place)


def parse_value(text: str, where: str) -> Any:
    """Parse the value of an override: None, a bool, a number, text, a list or a dictionary; ``''`` is empty text.

    Args:
        where: the key and its place, for messages.

    Raises:
        ConfigError: Hydra would refuse it, or start several runs with it.
    """
    if not text.strip(" \t"):
        return ""
    reader = _Reader(text, where)
    value = reader.element("")
    reader.skip_spaces()
    if reader.position < len(text):
        if text[reader.position] == ",":
            raise reader.error(
                "several values start several runs (Hydra's --multirun); keep one, or write a list as [a,b]"
            )
        raise reader.error(f"Hydra does not read {text[reader.position]!r} here; put the value in quotes")
    return value


class _Reader:
    """Reads a value from left to right."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.position = text, where, 0

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}={_shortened(self.text)}: {problem}")

    def skip_spaces(self) -> None:
        while self.text[self.position : self.position + 1] in (" ", "\t"):
            self.position += 1

    def next_is(self, mark: str) -> bool:
        """Return whether the next character after spaces is ``mark``, and step over it if so."""
        self.skip_spaces()
        found = self.text.startswith(mark, self.position)
        self.position += found
        return found

    def element(self, end: str) -> Any:
        """Read a value up to a comma, or to one of the characters of ``end``."""
        self.skip_spaces()
        first = self.text[self.position : self.position + 1]
        if first == "[":
            return self.elements()
        if first == "{":
            return self.dictionary()
        if first and first in "'\"":
            return self.quoted(first)
        if call := _FUNCTION.match(self.text, self.position):
            several = f"{call[1]}(…) starts several runs (Hydra's --multirun); write one value"
            raise self.error(several if call[1] in _SWEEPS else f"write the value itself instead of {call[1]}(…)")
        return self.unquoted(end)

    def elements(self) -> list[Any]:
        self.position += 1
        values: list[Any] = []
        if self.next_is("]"):
            return values
        while True:
            values.append(self.element("]"))
            if self.next_is("]"):
                return values
            if not self.next_is(","):
                raise self.error("a list is not closed with ]")

    def dictionary(self) -> dict[Any, Any]:
        self.position += 1
        values: dict[Any, Any] = {}
        if self.next_is("}"):
            return values
        while True:
            self.skip_spaces()
            if self.text[self.position : self.position + 1] in ("'", '"'):
                raise self.error("Hydra reads keys of a dictionary without quotes: {a:1}")
            key = self.unquoted(":}")
            if not self.next_is(":"):
                raise self.error("the entries of a dictionary are written {key:value}")
            values[key] = self.element("}")
            if self.next_is("}"):
                return values
            if not self.next_is(","):
                raise self.error("a dictionary is not closed with }")

    def quoted(self, quote: str) -> str:
        # backslashes count only before a quote: an odd number of them keeps it in the text
        closing = re.compile(rf"(?:[^{quote}\\]|\\(?:\\|{quote}|(?=.)))*{quote}", re.DOTALL)
        found = closing.match(self.text, self.position + 1)
        if found is None:
            raise self.error(f"the quote {quote} is not closed")
        self.position = found.end()
        content = found[0][:-1]
        return re.sub(rf"(\\+)({quote}|$)", lambda part: "\\" * (len(part[1]) // 2) + part[2], content)

    def unquoted(self, end: str) -> Any:
        """Read text without quotes; it is a number, a boolean or None where it looks like one."""
        parts: list[str] = []
        kept = 0  # parts that stripping must not take: after an escaped space
        plain = True
        while self.position < len(self.text):
            character = self.text[self.position]
            if character == "," or character in end:
                break
            if character == "\\" and self.text[self.position + 1 : self.position + 2] in tuple(_ESCAPABLE):
                parts.append(self.text[self.position + 1])
                kept = len(parts)
                self.position += 2
                plain = False
            elif found := _INTERPOLATION.match(self.text, self.position):
                parts.append(found[0])
                self.position = found.end()
                plain = False
            elif _UNQUOTED.match(character):
                parts.append(character)
                self.position += 1
            else:
                hint = "put the value in quotes" if character not in "[{]}" else "a bracket begins or ends a value"
                raise self.error(f"Hydra does not read {character!r} in text without quotes; {hint}")
        text = "".join(parts[:kept]) + "".join(parts[kept:]).rstrip(" \t")
        if not text:
            raise self.error("a value is missing")
        return _converted(text) if plain else text


def _converted(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
