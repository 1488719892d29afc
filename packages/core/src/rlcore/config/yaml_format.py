"""YAML as configuration needs it: the 1.2 core schema, no duplicate keys, and the line of every key.

PyYAML follows YAML 1.1, where ``1e-6`` is a string, ``no`` is false and ``1:30`` is ninety. Reading and writing agree
here on YAML 1.2's rules instead.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from rlcore.boundary import reason
from rlcore.errors import ConfigError

KeyPath = tuple[str | int, ...]

DEEPEST = 64
"""Levels of mappings and lists in a document."""
MOST_NODES = 100_000
"""Values in a document, those behind an alias counted each time that it is used."""

_SCALARS: dict[str, tuple[str, str]] = {  # tag -> (pattern, possible first characters)
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", "~nN"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} levels of mappings and lists", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                what = key.value if isinstance(key, yaml.ScalarNode) else "of several values"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shortened(what)} is not text; put it in quotes", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {shortened(repr(key.value))} stands here twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these line breaks as they are and reads spaces; in double quotes it escapes them
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


# tags of YAML 1.1 that configuration has no use for: bytes, dates, sets, ordered mappings
_CORE = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in _CORE
}
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), ["", *_first])
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10),
)


def parse(text: str, where: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse ``text``; return its value, and the line (from 1) of each key and list item.

    Raises:
        ConfigError: not YAML, or more of it than `DEEPEST` and `MOST_NODES` allow; names ``where``, line and column.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}
            if (count := _expanded_size(node, {})) > MOST_NODES:
                raise ConfigError(f"{where}: holds {count} values with its aliases; at most {MOST_NODES} are read")
            lines = _lines(node)  # before merge keys are resolved in the nodes
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise ConfigError(f"{place}: not valid YAML: {shortened(error.problem or error.context or '', 200)}") from None
    except yaml.reader.ReaderError as error:  # its own words end with the name of a buffer
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{where}:{line}: not valid YAML: {error.reason} (#x{error.character:04x})") from None
    except Exception as error:  # the constructors of tags raise whatever their conversion raises
        raise ConfigError(f"{where}: not valid YAML: {reason(error)}") from None


def dump(value: Any) -> str:
    """``value`` (plain mappings, lists, strings, numbers, bools, None) as YAML that `parse` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def inline(value: Any) -> str:
    """``value`` on one line, as it is written after ``key=``."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30, default_flow_style=True)
    return text.removesuffix("...\n").rstrip("\n")


def shortened(text: str, most: int = 80) -> str:
    """``text``, cut to ``most`` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _expanded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the values in ``node``, which aliases may reach many times.

    Raises:
        ConstructorError: a node holds itself.
    """
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            line = node.start_mark.line + 1
            raise yaml.constructor.ConstructorError(
                None, None, f"the value of line {line} holds itself", node.start_mark
            )
        return sizes[id(node)]
    sizes[id(node)] = 0  # being counted
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def _lines(node: yaml.Node, path: KeyPath = ()) -> dict[KeyPath, int]:
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    lines: dict[KeyPath, int] = {}
    for name, place, value in children:
        lines[*path, name] = place.start_mark.line + 1
        lines |= _lines(value, (*path, name))
    return lines
