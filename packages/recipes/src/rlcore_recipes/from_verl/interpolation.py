"""OmegaConf's interpolations in verl's values: ``${data.train_batch_size}``, ``${.n}``, ``${oc.env:HOME,/root}``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.assignment import Assignment
from rlcore_recipes.from_verl.hydra import parse_value

_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_DEEPEST = 20  # values that refer to each other


def resolved(assignments: Sequence[Assignment], environment: Mapping[str, str]) -> tuple[Assignment, ...]:
    """Return ``assignments``, one for each value of a dictionary, with what their interpolations refer to.

    Args:
        environment: for ``${oc.env:NAME}``.

    Raises:
        ConfigError: a value refers to a key that is not given, to an unset variable, or to itself.
    """
    single = [inner for assignment in assignments for inner in _flat(assignment)]
    values = {assignment.key: assignment.value for assignment in single if assignment.prefix != "~"}
    found = [
        replace(assignment, value=_Resolver(values, environment, assignment).resolve(assignment.value, assignment.key))
        for assignment in single
    ]
    return tuple(inner for assignment in found for inner in _flat(assignment))  # a reference may lead to a section


def _flat(assignment: Assignment) -> Iterator[Assignment]:
    """Yield ``assignment``, or one for each value of its dictionary."""
    if not isinstance(assignment.value, dict) or not assignment.value:
        yield assignment
        return
    for key, value in assignment.value.items():
        yield from _flat(replace(assignment, key=f"{assignment.key}.{key}", value=value))


class _Resolver:
    """Resolves the value of one assignment."""

    def __init__(self, values: Mapping[str, Any], environment: Mapping[str, str], assignment: Assignment) -> None:
        self.values, self.environment, self.assignment = values, environment, assignment

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.assignment.place}: {self.assignment.key}: {problem}")

    def resolve(self, value: Any, key: str, depth: int = 0) -> Any:
        """Resolve ``value``, which stands at ``key``."""
        if depth > _DEEPEST:
            raise self.error("its value refers to itself")
        if isinstance(value, list):
            return [self.resolve(item, f"{key}.{index}", depth) for index, item in enumerate(value)]
        if isinstance(value, dict):
            return {name: self.resolve(item, f"{key}.{name}", depth) for name, item in value.items()}
        while isinstance(value, str) and (found := _INNERMOST.search(value)):
            inner = self.resolve(self._referred(found[1].strip(), key, depth), key, depth + 1)
            if found[0] == value:
                return inner
            value = value[: found.start()] + _text(inner) + value[found.end() :]
        return value

    def _referred(self, reference: str, key: str, depth: int) -> Any:
        """Return what ``reference`` at ``key`` refers to; relative references in that begin at its own place."""
        name, colon, argument = reference.partition(":")
        if not colon:
            target = _absolute(reference, key)
            return self.resolve(self._value(target, f"${{{reference}}}"), target, depth + 1)
        first, comma, default = argument.partition(",")
        if name in ("oc.env", "env"):
            if first.strip() in self.environment:
                return (
                    parse_value(self.environment[first.strip()], self.assignment.place)
                    if name == "env"
                    else (self.environment[first.strip()])
                )
            if comma:
                return parse_value(default, self.assignment.place)
            raise self.error(f"the variable {first.strip()} is not set; give --env {first.strip()}=VALUE")
        if name == "oc.select":
            target = _absolute(first.strip(), key)
            if self._given(target):
                return self.resolve(self._value(target, f"${{{reference}}}"), target, depth + 1)
            return parse_value(default, self.assignment.place) if comma else None
        raise self.error(f"${{{reference}}} cannot be computed here; write its value")

    def _given(self, key: str) -> bool:
        return key in self.values or any(other.startswith(f"{key}.") for other in self.values)

    def _value(self, key: str, reference: str) -> Any:
        if key in self.values:
            return self.values[key]
        inner = {name: value for name, value in self.values.items() if name.startswith(f"{key}.")}
        if not inner:
            raise self.error(f"{reference} refers to {key}, which is not given; write the value")
        tree: dict[str, Any] = {}
        for name, value in inner.items():
            place = tree
            *parents, last = name[len(key) + 1 :].split(".")
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        return tree


def _absolute(reference: str, key: str) -> str:
    """Return the key that ``reference`` names at ``key``; each leading dot is one section upwards."""
    dots = len(reference) - len(reference.lstrip("."))
    if dots == 0:
        return re.sub(r"\[(\w+)\]", r".\1", reference)
    return ".".join([*key.split(".")[:-dots], reference[dots:]])


def _text(value: Any) -> str:
    return str(value) if value is not None else "null"
