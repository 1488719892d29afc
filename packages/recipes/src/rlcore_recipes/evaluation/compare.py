"""An evaluation from beginning to end: find the models, evaluate each, report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from rlcore.boundary import boundary
from rlcore.cli import recipes
from rlcore.cli.console import out as console
from rlcore.config import dump_config
from rlcore.errors import ConfigError
from rlcore_recipes.evaluation.configuration import eval_config
from rlcore_recipes.evaluation.report import ModelReport, reports, table, write_json
from rlcore_recipes.evaluation.run import evaluate
from rlcore_recipes.export.source import Choice
from rlcore_recipes.generation.candidates import Candidate, find_candidates
from rlcore_recipes.generation.from_run import url_keys
from rlcore_recipes.run.folder import changed_keys
from rlcore_recipes.settings.evaluation import EvalConfig

RESULTS = "results.json"
CONFIG = "evaluation.yaml"
"""The configuration; a folder without it, such as that of a run, holds no results."""
_MAY_CHANGE = ("report.", "controller.", "data.val_batch_size", "model.", "reward.workers")
"""Keys that do not change completions and their scores, or are compared otherwise."""


def compare(
    sources: Sequence[str],
    file: Path | None,
    overrides: Sequence[str],
    out: Path,
    choice: Choice,
    *,
    urls: Sequence[str] = (),
    overwrite: bool = False,
) -> list[ModelReport]:
    """Evaluate the model of each source, print a table and write `RESULTS`.

    Raises:
        RlcoreError: something in the input is missing or broken, or ``out`` holds results under other settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("an evaluation is one process: start it without torchrun, or set controller.kind=ray")
    config, candidates = _settings(sources, file, [*url_keys(urls), *overrides], choice)
    recipes.check_packages(config)
    _prepare(out, config, overwrite)
    found = []
    for candidate in candidates:

        def progress(done: int, total: int, name: str = candidate.name) -> None:
            click.echo(f"{name}: {done:,} of {total:,} prompts", err=True)

        found.append((candidate.name, candidate.source, evaluate(config, candidate, out, progress)))
    result = reports(config, found)
    write_json(out / RESULTS, config, result)
    console.print(table(result, config.report.confidence))
    click.echo(f"{out / RESULTS}", err=True)
    return result


def _settings(
    sources: Sequence[str], file: Path | None, overrides: Sequence[str], choice: Choice
) -> tuple[EvalConfig, list[Candidate]]:
    """Return the configuration and the models; without sources, the configuration names the only one."""
    candidates = find_candidates(sources, choice)
    config = eval_config(file, overrides, candidates)
    if candidates:
        return config, candidates
    (only,) = find_candidates([config.model.path])
    return config, [replace(only, model=config.model.path) if isinstance(only.model, str) else only]


def _prepare(out: Path, config: EvalConfig, overwrite: bool) -> None:
    """Write the configuration to ``out``; refuse results under another one, unless they are to be overwritten.

    Raises:
        ConfigError: there are results under other settings, or the folder cannot be written.
    """
    path = out / CONFIG
    changed = [key for key in changed_keys(path, config) if not key.startswith(_MAY_CHANGE)]
    if changed and not overwrite:
        raise ConfigError(
            f"{out} holds results under other settings ({', '.join(changed[:5])}): give another --out, or --overwrite "
            "to start from the beginning"
        )
    with boundary(f"--out {out} cannot be written", ConfigError):
        if not path.exists() and out.is_dir() and os.listdir(out):
            raise ConfigError(f"--out {out} holds something else than results: name another folder")
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("*.jsonl") if overwrite else ():
            old.unlink()
        path.write_text(dump_config(config), encoding="utf-8")
