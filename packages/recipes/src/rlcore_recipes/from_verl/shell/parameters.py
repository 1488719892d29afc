"""The operators of ``${NAME…}`` that change the text of a variable."""

from __future__ import annotations

import fnmatch
import re


def changed(text: str, operator: str, argument: str) -> str | None:
    """Return ``text`` after ``operator`` with ``argument``; None if this operator is not read."""
    match operator:
        case "%" | "%%" | "#" | "##":
            return _trimmed(text, operator, argument)
        case "/" | "//" | "/#" | "/%":
            pattern, _, new = argument.partition("/")
            return _replaced(text, operator, pattern, new)
        case ",,":
            return text.lower()
        case "^^":
            return text.upper()
        case ",":
            return text[:1].lower() + text[1:]
        case "^":
            return text[:1].upper() + text[1:]
        case ":":
            return _slice(text, argument)
    return None


def _trimmed(text: str, operator: str, pattern: str) -> str:
    """Remove the shortest, or longest, end or beginning that matches."""
    matches = re.compile(fnmatch.translate(pattern)).match
    cuts = range(len(text) + 1)
    if operator[0] == "%":
        found = [cut for cut in cuts if matches(text[cut:])]
        return text[: (min if len(operator) == 2 else max)(found)] if found else text
    found = [cut for cut in cuts if matches(text[:cut])]
    return text[(max if len(operator) == 2 else min)(found) :] if found else text


def _replaced(text: str, operator: str, pattern: str, new: str) -> str:
    # what fnmatch writes around the pattern's own expression: (?s:…)\Z
    inner = re.sub(r"\\[zZ]$", "", fnmatch.translate(pattern))
    expression = {"/#": rf"\A{inner}", "/%": rf"{inner}\Z"}.get(operator, inner)
    return re.sub(expression, lambda _: new, text, count=0 if operator == "//" else 1)


def _slice(text: str, argument: str) -> str | None:
    found = re.fullmatch(r"\s*(-?\d+)\s*(?::\s*(-?\d+)\s*)?", argument)
    if found is None:
        return None
    start = int(found[1])
    start = max(len(text) + start, 0) if start < 0 else start
    if found[2] is None:
        return text[start:]
    length = int(found[2])
    return text[start : start + length] if length >= 0 else text[start:length]
