"""``rlcore generate`` and ``rlcore chat``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rlcore.cli import recipes
from rlcore_recipes.export.command import choice_options

_OPTIONS = (
    click.option("--max-tokens", type=click.IntRange(min=1), help="Maximum tokens of a completion."),
    click.option("--temperature", type=click.FloatRange(min=0), help="Sampling temperature; 0 is greedy."),
    click.option("--system", help="System prompt."),
    click.option("--url", "urls", multiple=True, help="A server that serves SOURCE (rollout.engine=http); repeatable."),
)


def _generation_options(function: Any) -> Any:
    for option in reversed(_OPTIONS):
        function = option(function)
    return choice_options(function)


@click.command(cls=recipes.ConfiguredCommand)
@click.argument("source")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--prompt", "prompts", multiple=True, help="A prompt; repeatable.")
@click.option("--file", "files", multiple=True, help="Parquet or JSONL file of prompts (data.prompt_key); repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Parquet or JSONL file to write; default: print.")
@click.option("--overwrite", is_flag=True, help="Replace the file that is there.")
@click.option("-n", type=click.IntRange(min=1), help="Completions per prompt.")
@_generation_options
def generate(
    source: str,
    overrides: tuple[str, ...],
    prompts: tuple[str, ...],
    files: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    step: int | None,
    best: bool,
    run_config: Path | None,
    urls: tuple[str, ...],
    **options: Any,
) -> None:
    """Complete prompts with a model, a run's newest checkpoint, or a checkpoint.

    A prompt is a user message if the model has a chat template. Keys are those of a run's sections model, data and
    rollout; those of the checkpoint's run hold unless they are given.
    """
    from rlcore_recipes.export.source import Choice
    from rlcore_recipes.generation.completions import check_file, complete, write_rows
    from rlcore_recipes.generation.configuration import generation_config

    if not prompts and not files:
        raise click.UsageError("give --prompt or --file")
    if out is not None:
        check_file(out, overwrite)
    words = [*overrides, f"data.val_files={json.dumps(files)}"] if files else overrides
    chosen, candidate = generation_config(source, Choice(step, best, run_config), words, urls, options)

    def progress(done: int, total: int) -> None:
        if total > 1:
            click.echo(f"{done:,} of {total:,} prompts", err=True)

    rows = complete(chosen, candidate, prompts, progress)
    if out is not None:
        write_rows(out, rows)
        click.echo(f"{out}: {len(rows):,} rows", err=True)
        return
    several = len(rows) * len(rows[0]["completions"]) > 1
    for number, row in enumerate(rows, 1):
        for sample, text in enumerate(row["completions"], 1):
            click.echo(f"--- prompt {number}, completion {sample}\n{text}" if several else text)


@click.command(cls=recipes.ConfiguredCommand)
@click.argument("source")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@_generation_options
def chat(
    source: str,
    overrides: tuple[str, ...],
    step: int | None,
    best: bool,
    run_config: Path | None,
    urls: tuple[str, ...],
    **options: Any,
) -> None:
    """Talk to a model, a run's newest checkpoint, or a checkpoint; reads lines from the terminal or a pipe.

    /reset forgets the conversation, /system TEXT sets the system prompt, /quit ends.
    """
    from rlcore_recipes.export.source import Choice
    from rlcore_recipes.generation.chat import chat as talk
    from rlcore_recipes.generation.configuration import generation_config

    chosen, candidate = generation_config(source, Choice(step, best, run_config), overrides, urls, options)
    talk(chosen, candidate)
