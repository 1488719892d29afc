"""Recipes on the command line: which there are, and the arguments that make up a configuration."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from rlcore import plugins
from rlcore.config import Config, load_config
from rlcore.errors import ConfigError, PluginError
from rlcore.plugins import Plugin

GROUP = "rlcore.recipes"


def recipe_parameter() -> click.Parameter:
    """``recipe``: a name, checked by whoever looks the plugin up."""
    return click.Argument(["recipe"], shell_complete=_complete)


def configuration_parameters() -> list[click.Parameter]:
    """``file`` (str | None) and ``overrides`` (tuple of "a.b=value"), for `load`."""
    file = click.Option(
        ["-c", "--config", "file"],
        type=click.Path(),
        metavar="FILE",
        help="YAML file, or the name of a ready-made configuration; defaults hold for what it does not set.",
    )
    return [file, click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]...")]


def load(plugin: Plugin, file: str | None, overrides: tuple[str, ...]) -> Config:
    """The configuration that `configuration_parameters` describe.

    Raises:
        ConfigError: there is no such file, or the configuration is not valid.
    """
    path = None if file is None else Path(file)
    if path is not None and len(path.parts) == 1 and not path.suffix and not path.exists():
        ready_made = plugin.ready_made()
        if path.name not in ready_made:
            names = ", ".join(ready_made) or "none"
            raise ConfigError(f"{file}: neither a file nor a ready-made configuration of this recipe ({names})")
        path = ready_made[path.name]
    return load_config(plugin.config_class(), path, overrides)


def summary(name: str) -> str:
    try:
        return plugins.get(GROUP, name).summary
    except PluginError as error:
        return f"does not work: {error}"


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=summary(name)) for name in plugins.names(GROUP) if name.startswith(incomplete)]
