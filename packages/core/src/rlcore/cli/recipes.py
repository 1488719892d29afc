"""Recipes on the command line: which there are, and the arguments that make up a configuration."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from rlcore import plugins
from rlcore.config import Config, load_config, missing_packages
from rlcore.config.files import file_layers
from rlcore.errors import ConfigError, PluginError
from rlcore.plugins import Plugin

GROUP = "rlcore.recipes"


def recipe_parameter() -> click.Parameter:
    """Return the parameter ``recipe``: a name, which is checked when the plugin is looked up."""
    return click.Argument(["recipe"], shell_complete=_complete)


def configuration_parameters() -> list[click.Parameter]:
    """Return the parameters ``file`` (str | None) and ``overrides`` (tuple of "a.b=value"), for `load`."""
    file = click.Option(
        ["-c", "--config", "file"],
        type=click.Path(),
        metavar="FILE",
        help="YAML file, or the name of a ready-made configuration; defaults hold for what it does not set.",
    )
    return [file, click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]...")]


class ConfiguredCommand(click.Command):
    """A command with `configuration_parameters`. It says how an override is written that looks like an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given_all = list(args)  # click empties args
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name  # of an argument with one dash, click names the first letter alone
            given = next((arg for arg in given_all if arg.split("=")[0] == name or arg[:2] == name), None)
            if given is None:
                raise
            key, _, value = given.lstrip("-").partition("=")
            following = given_all[given_all.index(given) + 1 :]
            if "=" not in given and following and not following[0].startswith("-") and "=" not in following[0]:
                value = following[0]
            if "." not in key and "=" not in given:
                raise
            raise click.UsageError(
                f"no such option {given.split('=')[0]}; keys are written without dashes: {key}={value}", ctx
            ) from None


def load(plugin: Plugin, file: str | None, overrides: tuple[str, ...]) -> Config:
    """Load the configuration that `configuration_parameters` describe.

    Raises:
        ConfigError: there is no such file, or the configuration is not valid.
    """
    path = None if file is None else configuration_file(plugin, file)
    if path is not None:
        file_layers(path)  # what is wrong with the file itself is said before the recipe, and torch, is imported
    return load_config(plugin.config_class(), path, overrides)


def configuration_file(plugin: Plugin, file: str) -> Path:
    """Return the path of ``file``, which may be the name of a ready-made configuration.

    Raises:
        ConfigError: there is neither a file nor a ready-made configuration of that name.
    """
    path = Path(file)
    if len(path.parts) != 1 or path.suffix or path.exists():
        return path
    ready_made = plugin.ready_made()
    if path.name not in ready_made:
        names = ", ".join(ready_made) or "none"
        close = get_close_matches(path.name, ready_made, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"{file}: neither a file nor a ready-made configuration of this recipe ({names}){hint}")
    return ready_made[path.name]


def load_complete(plugin: Plugin, file: str | None, overrides: tuple[str, ...]) -> Config:
    """Load a configuration as `load` does, and check that every package it needs is installed.

    Raises:
        ConfigError: also if one is not installed; the message has one line per key.
    """
    config = load(plugin, file, overrides)
    check_packages(config)
    return config


def check_packages(config: Config) -> None:
    """Check that every package is installed that ``config`` needs.

    Raises:
        ConfigError: one is not; the message has one line per key.
    """
    missing = [f"{key}: {advice}" for key, advice in missing_packages(config)]
    if missing:
        count = f"{len(missing)} package{'s' * (len(missing) > 1)}"
        raise ConfigError("\n  ".join([f"the configuration is valid, but {count} cannot be found:", *missing]))


def find_own_modules() -> None:
    """Let modules in the working folder be imported, as ``python -m`` does: functions of the user's own are found."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def summary(name: str) -> str:
    """Return the summary of the recipe ``name``, or why it cannot be used."""
    try:
        return plugins.get(GROUP, name).summary
    except PluginError as error:
        return f"cannot be used: {error}"


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=summary(name)) for name in plugins.names(GROUP) if name.startswith(incomplete)]
