"""``rlcore plugins``."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from rlcore import plugins
from rlcore.cli.console import out


@click.command()
@click.option("--check", is_flag=True, help="Exit with code 1 if a plugin is broken or lacks a package.")
@click.pass_context
def list_plugins(ctx: click.Context, check: bool) -> None:
    """List installed plugins, and why one does not work.

    Everything that a plugin names is imported, which may take a while.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("group", "name", "package", "interface", "status"):
        table.add_column(title, no_wrap=True)
    table.add_column("summary, or what is wrong", overflow="fold")
    listed = list(plugins.listing())
    for item in listed:
        interface = str(item.plugin.interface) if item.plugin else ""
        table.add_row(
            item.group.removeprefix("rlcore."),
            item.name,
            item.distribution,
            interface,
            _status(item),
            Text(_words(item)),
        )
    out.print(table)
    if check and any(item.problem or item.missing for item in listed):
        ctx.exit(1)


def _status(item: plugins.Installed) -> Text:
    if item.problem:
        return Text("broken", style="red")
    if item.missing:
        return Text("incomplete", style="yellow")
    return Text("ok", style="green")


def _words(item: plugins.Installed) -> str:
    summary = item.plugin.summary if item.plugin else ""
    return item.problem or "; ".join(package.advice for package in item.missing) or summary
