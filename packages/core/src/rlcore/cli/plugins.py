"""``rlcore plugins``."""

from __future__ import annotations

import click
from rich.table import Table
from rich.text import Text

from rlcore import plugins
from rlcore.cli.console import out


@click.command()
@click.option("--check", is_flag=True, help="Import what each plugin names as well, which may take a while.")
@click.pass_context
def list_plugins(ctx: click.Context, check: bool) -> None:
    """List installed plugins, and why one does not work.

    With --check the exit code is 1 if one does not.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("group", "name", "package", "interface", "status"):
        table.add_column(title, no_wrap=True)
    table.add_column("summary, or what is wrong", overflow="fold")
    listed = [plugins.check(item) if check else item for item in plugins.listing()]
    for item in listed:
        interface = str(item.plugin.interface) if item.plugin else ""
        summary = Text(item.problem or (item.plugin.summary if item.plugin else ""))
        status = _status(item, check)
        table.add_row(item.group.removeprefix("rlcore."), item.name, item.distribution, interface, status, summary)
    out.print(table)
    if check and any(item.problem for item in listed):
        ctx.exit(1)


def _status(item: plugins.Installed, checked: bool) -> Text:
    if item.problem:
        return Text("broken", style="red")
    return Text("ok", style="green") if item.plugin or checked else Text("not loaded", style="dim")
