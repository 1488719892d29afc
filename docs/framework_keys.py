"""Write the page of the keys of TRL, verl and OpenRLHF from the tables that error messages and `rlcore from-verl` use.

``conf.py`` calls `write` before each build; run as a script, it prints the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from rlcore_recipes.foreign.names import OPENRLHF, TRL, Equivalent
from rlcore_recipes.from_verl.keys.entries import Key
from rlcore_recipes.from_verl.keys.table import reinforcement_table, supervised_table

HEADER = """\
# Keys of TRL, verl and OpenRLHF

What each key of three other frameworks is in rlcore. The page is generated from the tables by which `rlcore run`
answers an unknown key and `rlcore from-verl` translates a command. [Other frameworks](../other-frameworks.md)
describes where values mean something else. An argument that has the name of rlcore's key, such as `temperature`, is
not listed.
"""


def page() -> str:
    """Return the page as Markdown: a table for each framework, and for each section of verl."""
    lines = [HEADER, "## TRL", *arguments(TRL), "## OpenRLHF", *arguments(OPENRLHF)]
    for title, table in (("verl", reinforcement_table()), ("verl's SFT trainer", supervised_table())):
        lines.append(f"## {title}")
        for section, keys in grouped(table):
            lines += [f"### `{section}` of {title}", *verl_rows(keys)]
    return "\n\n".join(lines) + "\n"


def write(path: Path) -> None:
    """Write the page to ``path`` unless that is its text already."""
    text = page()
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def arguments(names: dict[str, Equivalent]) -> Iterator[str]:
    """Yield the table of a framework's arguments."""
    yield table((name, ours, remark) for name, (ours, remark) in names.items())


def grouped(keys: Iterable[Key]) -> list[tuple[str, list[Key]]]:
    """Return the keys of each section of verl, in the order of the table."""
    found: dict[str, list[Key]] = {}
    for key in keys:
        parts = key.name.split(".")
        depth = 2 if parts[0] == "actor_rollout_ref" else 1
        found.setdefault(".".join(parts[:depth]), []).append(key)
    return list(found.items())


def verl_rows(keys: Iterable[Key]) -> Iterator[str]:
    """Yield the table of keys of verl, with the names of other versions."""
    yield table(("`, `".join((key.name, *key.old)), key.ours, key.meaning) for key in keys)


def table(rows: Iterable[tuple[str, tuple[str, ...], str]]) -> str:
    """Return a table of names, keys of rlcore and remarks."""
    lines = ["| There | In rlcore | |", "|---|---|---|"]
    for name, ours, remark in rows:
        here = ", ".join(f"`{target}`" for target in ours)
        lines.append(
            f"| `{name}` | {here} | {' '.join(remark.split()).replace('|', '/').replace('<', chr(92) + '<')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
