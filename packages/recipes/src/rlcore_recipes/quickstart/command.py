"""``rlcore quickstart``."""

from pathlib import Path

import click

from rlcore.cli.folder import Folder


@click.command()
@click.option(
    "--out",
    type=Folder(),
    default=Path("rlcore-quickstart"),
    show_default=True,
    help="Folder to write; must be empty or new.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything.")
@click.option("--steps", type=click.IntRange(min=1), default=140, show_default=True, help="Steps of GRPO.")
def quickstart(out: Path, seed: int, steps: int) -> None:
    """Train a small model from scratch on this machine: no GPU, no network, about three minutes on two cores.

    Generates arithmetic word problems in GSM8K's format, trains a tokenizer and a Qwen2 model on worked solutions until
    it is mediocre, and then lets GRPO make it good from rewards alone.
    """
    from rlcore_recipes.quickstart.run import run_quickstart

    run_quickstart(out, seed, steps)
