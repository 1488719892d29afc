"""``rlcore config``."""

from __future__ import annotations

import json

import click

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.config import dump_config
from rlcore.config.schema import file_schema


@click.group()
def config() -> None:
    """Show, check or describe the configuration of a recipe."""


@config.command(cls=recipes.ConfiguredCommand, params=[recipes.recipe_parameter(), *recipes.configuration_parameters()])
def show(recipe: str, file: str | None, overrides: tuple[str, ...]) -> None:
    """Print the configuration as YAML, with every default filled in."""
    click.echo(dump_config(recipes.load(plugins.get(recipes.GROUP, recipe), file, overrides)), nl=False)


@config.command(cls=recipes.ConfiguredCommand, params=[recipes.recipe_parameter(), *recipes.configuration_parameters()])
def validate(recipe: str, file: str | None, overrides: tuple[str, ...]) -> None:
    """Check a configuration, and list everything that is wrong with it.

    That includes packages which it needs and which are not installed here.
    """
    recipes.load_complete(plugins.get(recipes.GROUP, recipe), file, overrides).warn_of_doubts()
    click.echo("valid")


@config.command(params=[recipes.recipe_parameter()])
def schema(recipe: str) -> None:
    """Print the JSON Schema, by which editors check and complete YAML files."""
    click.echo(json.dumps(file_schema(plugins.get(recipes.GROUP, recipe).config_class()), indent=2))
