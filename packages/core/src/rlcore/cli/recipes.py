"""Recipes on the command line: which there are, and the arguments that make up a configuration."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from rlcore import plugins
from rlcore.errors import PluginError

GROUP = "rlcore.recipes"


def recipe_parameter() -> click.Parameter:
    """``recipe``: a name, checked by whoever looks the plugin up."""
    return click.Argument(["recipe"], shell_complete=_complete)


def configuration_parameters() -> list[click.Parameter]:
    """``path`` (Path | None) and ``overrides`` (tuple of "a.b=value")."""
    path = click.Option(
        ["-c", "--config", "path"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="YAML file; defaults hold for what it does not set.",
    )
    return [path, click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]...")]


def summary(name: str) -> str:
    try:
        return plugins.get(GROUP, name).summary
    except PluginError as error:
        return f"does not work: {error}"


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=summary(name)) for name in plugins.names(GROUP) if name.startswith(incomplete)]
