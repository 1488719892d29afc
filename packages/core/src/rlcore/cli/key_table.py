"""The keys of a configuration, for help."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlcore.config import Config
from rlcore.config.keys import Key, sections

_LONGEST_DEFAULT = 48


def print_keys(console: Console, model: type[Config]) -> None:
    """A table per section, under the prefix of its keys."""
    for section in sections(model):
        if not section.keys and not section.path:
            continue
        console.print()
        prefix = f"{section.path}.…" if section.path else "(top level)"
        console.print(Text.assemble((prefix, "bold cyan"), f"  {section.description}"))
        if section.keys:
            console.print(_table(section.keys))


def _table(keys: list[Key]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=True)
    table.add_column(width=30, overflow="fold", style="bold")
    table.add_column(width=16, overflow="fold", style="green")
    table.add_column(width=20, overflow="fold", style="magenta")
    table.add_column(ratio=1)
    for key in keys:
        default = Text("required", style="bold red") if key.default is None else Text(_shortened(key.default))
        table.add_row(Text(f"  {key.name}"), default, Text(key.type), Text(key.description))
    return table


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_DEFAULT else f"{text[: _LONGEST_DEFAULT - 1]}…"
