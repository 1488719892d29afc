"""``rlcore config``."""

from __future__ import annotations

import json

import click

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.config import dump_config


@click.group()
def config() -> None:
    """Show, check or describe the configuration of a recipe."""


@config.command(params=[recipes.recipe_parameter(), *recipes.configuration_parameters()])
def show(recipe: str, file: str | None, overrides: tuple[str, ...]) -> None:
    """Print the configuration as YAML, with every default filled in."""
    click.echo(dump_config(recipes.load(plugins.get(recipes.GROUP, recipe), file, overrides)), nl=False)


@config.command(params=[recipes.recipe_parameter(), *recipes.configuration_parameters()])
def validate(recipe: str, file: str | None, overrides: tuple[str, ...]) -> None:
    """Check a configuration, and list everything that is wrong with it."""
    recipes.load(plugins.get(recipes.GROUP, recipe), file, overrides)
    click.echo("valid")


@config.command(params=[recipes.recipe_parameter()])
def schema(recipe: str) -> None:
    """Print the JSON Schema, by which editors check and complete YAML files."""
    click.echo(json.dumps(plugins.get(recipes.GROUP, recipe).config_class().model_json_schema(), indent=2))
