"""Write the page of every configuration key from the configuration models of the installed recipes and plugins.

``conf.py`` calls `write` before each build; run as a script, it prints the page.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlcore import plugins
from rlcore.config.keys import Key, Section, sections

HEADER = """\
# Configuration keys

Every key of every recipe, with the sections of the backends, rewards and trackers that rlcore ships. The page is
generated from the pydantic models that check a configuration, so it shows what the code accepts.
[Configuration](../configuration.md) explains files, overrides and the syntax of values;
`rlcore run grpo --help actor.optim` prints the same in a terminal.

Each key is listed with its type, range and default. A section with `[]` or `<name>` in its path is repeated for each
element of a list, or for each name that you choose.
"""


class Table(NamedTuple):
    """The keys of a section, and the recipes that have exactly these keys there."""

    section: Section
    recipes: list[str]

    @property
    def title(self) -> str:
        """The path of the section, and the algorithm whose parameters it holds."""
        path = f"`{self.section.path}`" if self.section.path else "Top level"
        return f"{path}, parameters of `{self.algorithm[0]}`" if self.algorithm else path

    @property
    def algorithm(self) -> tuple[str, str] | None:
        """Name and summary of the registered algorithm that takes these keys as parameters."""
        found = re.fullmatch(r"with \S+=(\w+): (.*)", self.section.description)
        return (found[1], found[2]) if found else None


def page() -> str:
    """Return the page as Markdown: a heading and a list for each section of keys."""
    found = tables()
    titles = Counter(table.title for table in found)
    lines = [HEADER]
    for table in found:
        several = titles[table.title] > 1
        lines += [f"## {table.title}" + (f" in {', '.join(table.recipes)}" if several else ""), "", *entries(table)]
    return "\n".join(lines) + "\n"


def write(path: Path) -> None:
    """Write the page to ``path`` unless that is its text already."""
    text = page()
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def tables() -> list[Table]:
    """Return the sections of all recipes in the order of their paths."""
    found: dict[str, list[Table]] = {}
    for recipe in plugins.names("rlcore.recipes"):
        for section in sections(plugins.get("rlcore.recipes", recipe).config_class()):
            if not section.keys and section.model is not None:
                continue
            new = Table(section, [recipe])
            same = [
                table
                for table in found.setdefault(section.path, [])
                if table.section.keys == section.keys and table.algorithm == new.algorithm
            ]
            if same:
                same[0].recipes.append(recipe)
            else:
                found[section.path].append(new)
    return [table for path in sorted(found, key=lambda path: path.split(".")) for table in found[path]]


def entries(table: Table) -> Iterator[str]:
    """Yield the Markdown lines of a section below its heading: a definition list of its keys."""
    section = table.section
    description = table.algorithm[1] if table.algorithm else section.description
    if description and section.path:
        yield f"{escaped(description).rstrip('.')}.\n"
    yield f"Recipes: {', '.join(f'`{recipe}`' for recipe in table.recipes)}.\n"
    for key in section.keys:
        kind, bounds = type_and_range(key)
        facts = [f"*{escaped(kind)}*"]
        if bounds:
            facts.append(f"range {escaped(bounds)}")
        if key.default is None:
            facts.append("**required**")
        elif key.default:
            facts.append(f"default `{key.default}`")
        yield f"`{f'{section.path}.{key.name}'.lstrip('.')}`\n: {' · '.join(facts)}\n\n  {escaped(key.description)}\n"


def type_and_range(key: Key) -> tuple[str, str]:
    """Split ``float > 0 and ≤ 1 | null`` into ``float | null`` and ``> 0 and ≤ 1``."""
    if key.type == "text" and key.options:
        return " | ".join(key.options), ""
    found = re.fullmatch(r"(.*?) ([<>≤≥].*?)( \| null)?", key.type)
    return (found[1] + (found[3] or ""), found[2]) if found else (key.type, "")


def escaped(text: str) -> str:
    """Return ``text`` on one line, without characters that Markdown interprets."""
    return " ".join(text.split()).replace("<", "\\<").replace("*", "\\*")


if __name__ == "__main__":
    print(page())
