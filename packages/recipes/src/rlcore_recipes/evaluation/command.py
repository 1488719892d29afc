"""``rlcore eval``."""

from __future__ import annotations

from pathlib import Path

import click

from rlcore.cli import recipes
from rlcore.cli.folder import Folder
from rlcore_recipes.export.command import choice_options


@click.command(name="eval", cls=recipes.ConfiguredCommand)
@click.argument("words", nargs=-1, metavar="[SOURCE]... [KEY=VALUE]...")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="YAML file with the keys of an evaluation.")
@click.option("--out", type=Folder(), required=True, help="Folder of the results; an interrupted evaluation continues.")
@choice_options
@click.option("--url", "urls", multiple=True, help="A server that serves SOURCE (rollout.engine=http); repeatable.")
@click.option("--overwrite", is_flag=True, help="Start from the beginning, without the results that are there.")
def evaluate(
    words: tuple[str, ...],
    config: Path | None,
    out: Path,
    step: int | None,
    best: bool,
    run_config: Path | None,
    urls: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Measure models on prompts with a reward, and compare them with the first.

    A SOURCE is a model (folder or Hub name), a run (its newest checkpoint) or a checkpoint. Keys are those of a run:
    data.val_files, reward.*, rollout.engine, rollout.validation.n …; those of a run that is named hold unless a file is
    given. Without a SOURCE, model.path is evaluated.
    """
    from rlcore_recipes.evaluation.compare import compare
    from rlcore_recipes.export.source import Choice

    sources = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    recipes.find_own_modules()
    try:
        compare(sources, config, overrides, out, Choice(step, best, run_config), urls=urls, overwrite=overwrite)
    except KeyboardInterrupt:
        click.echo(f"interrupted; the same command continues with the results in {out}", err=True)
        raise
