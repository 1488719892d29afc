"""``rlcore plugins``: every installed plugin, and why one cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import click
from rich.table import Table
from rich.text import Text

from rlcore import plugins
from rlcore.boundary import boundary
from rlcore.cli.console import out
from rlcore.config.requirements import missing_by_default
from rlcore.errors import PluginError
from rlcore.packages import Package


@dataclass(frozen=True)
class Installed:
    """One entry point.

    Attributes:
        distribution: name and version of the package that offers it.
        plugin: None if it cannot be used (see ``problem``), or if the members of its group are not plugins.
        missing: optional packages that the plugin's default settings need and that are not installed.
    """

    group: str
    name: str
    distribution: str
    plugin: plugins.Plugin | None = None
    problem: str = ""
    missing: tuple[Package, ...] = ()


@click.command()
@click.option("--check", is_flag=True, help="Exit with code 1 if a plugin is broken or lacks a package.")
@click.pass_context
def list_plugins(ctx: click.Context, check: bool) -> None:
    """List installed plugins, and why one cannot be used.

    Imports everything that a plugin names, which may take a while.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("group", "name", "package", "interface", "status"):
        table.add_column(title, no_wrap=True)
    table.add_column("summary, or what is wrong", overflow="fold")
    listed = list(installed())
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


def _status(item: Installed) -> Text:
    if item.problem:
        return Text("broken", style="red")
    if item.missing:
        return Text("incomplete", style="yellow")
    return Text("ok", style="green")


def _words(item: Installed) -> str:
    summary = item.plugin.summary if item.plugin else ""
    return item.problem or "; ".join(package.advice for package in item.missing) or summary


def installed() -> Iterator[Installed]:
    """Yield every entry point of every group after importing what it names: configuration, factory, backend.

    The factory of a plugin that lacks an optional package is not imported, as it may fail without the package.
    """
    for group in [*plugins.GROUPS, plugins.ALGORITHMS, plugins.COMMANDS]:
        for name in plugins.names(group):
            item = Installed(group, name, plugins.origin(group, name))
            try:
                yield _checked(item)
            except PluginError as error:
                yield replace(item, problem=str(error))


def _checked(item: Installed) -> Installed:
    if item.group not in plugins.GROUPS:
        plugins.load(item.group, item.name, "entry point")
        return item
    plugin = plugins.get(item.group, item.name)
    with boundary(f"the defaults of {plugin.config} cannot be used", PluginError):
        missing = missing_by_default(plugin.config_class())
    plugin.ready_made()
    if not missing:
        plugin.import_factory()
    return replace(item, plugin=plugin, missing=tuple(missing))
