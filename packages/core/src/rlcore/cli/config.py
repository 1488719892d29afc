"""``rlcore config``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.config import Config, dump_config, load_config


@click.group()
def config() -> None:
    """Show, check or describe the configuration of a recipe."""


@config.command(params=[recipes.recipe_parameter(), *recipes.configuration_parameters()])
def show(recipe: str, path: Path | None, overrides: tuple[str, ...]) -> None:
    """Print the configuration as YAML, with every default filled in."""
    click.echo(dump_config(load_config(_model(recipe), path, overrides)), nl=False)


@config.command(params=[recipes.recipe_parameter(), *recipes.configuration_parameters()])
def validate(recipe: str, path: Path | None, overrides: tuple[str, ...]) -> None:
    """Check a configuration, and list everything that is wrong with it."""
    load_config(_model(recipe), path, overrides)
    click.echo("valid")


@config.command(params=[recipes.recipe_parameter()])
def schema(recipe: str) -> None:
    """Print the JSON Schema, by which editors check and complete YAML files."""
    click.echo(json.dumps(_model(recipe).model_json_schema(), indent=2))


def _model(recipe: str) -> type[Config]:
    return plugins.get(recipes.GROUP, recipe).config_class()
