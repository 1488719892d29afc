"""``rlcore model``: make a small model from scratch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rlcore.cli.folder import Folder


@click.group()
def model() -> None:
    """Make small models to try things out with."""


@model.command()
@click.option("--out", type=Folder(), required=True, help="Folder to write; must not hold anything.")
@click.option("--train-files", multiple=True, required=True, help="Parquet file to train the tokenizer on; repeatable.")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
def new(out: Path, train_files: tuple[str, ...], overrides: tuple[str, ...]) -> None:
    """Make a randomly initialised Qwen2 model with a tokenizer trained on a data set.

    Sizes are set by key=value: vocab_size, hidden_size, layers, heads, kv_heads, intermediate_size,
    max_position_embeddings, seed.
    """
    from rlcore.config import load_config
    from rlcore_recipes.small_model.qwen2 import SmallModelSettings, write_small_model

    settings = load_config(SmallModelSettings, None, overrides)
    parameters = write_small_model(out, _texts(train_files), settings)
    click.echo(f"{out}: Qwen2 with {parameters:,} random parameters and its tokenizer")


def _texts(files: tuple[str, ...]) -> Iterator[str]:
    from rlcore_recipes.data.files import read_rows

    for file in files:
        for row in read_rows(file):
            yield from _strings(row.get("prompt"))
            yield from _strings(row.get("response"))


def _strings(value: Any) -> Iterator[str]:
    """Yield the text of a prompt: itself, or the contents of its messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for message in value:
            yield from _strings(message.get("content") if isinstance(message, dict) else None)
