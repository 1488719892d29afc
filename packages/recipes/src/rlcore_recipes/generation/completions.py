"""Complete prompts, of the command line or of files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlcore.batch import Batch
from rlcore.boundary import boundary
from rlcore.engines.episode import PromptSample
from rlcore.errors import ConfigError, DataError
from rlcore_recipes.data.end_tokens import check_tokens
from rlcore_recipes.data.prompts import load_prompts
from rlcore_recipes.generation.candidates import Candidate
from rlcore_recipes.generation.model import LoadedModel, loaded_model
from rlcore_recipes.rollouts.completion_text import completion_texts, completion_tokens
from rlcore_recipes.rollouts.episode import single_completion
from rlcore_recipes.rollouts.group_job import run_groups
from rlcore_recipes.rollouts.plan import RolloutPlan
from rlcore_recipes.settings.generation import GenerationConfig

Row = dict[str, Any]
OWN_COLUMNS = ("prompt", "completions", "finish_reasons", "completion_tokens")
SUFFIXES = (".parquet", ".jsonl")


def complete(
    config: GenerationConfig, candidate: Candidate, prompts: Sequence[str], progress: Callable[[int, int], None]
) -> list[Row]:
    """Return a row for each of ``prompts`` and each row of ``config.data.val_files``.

    A row has the file's other columns and `OWN_COLUMNS`: the messages, and of each completion the text, why it ended,
    and its length in tokens.

    Raises:
        RlcoreError: something in the input is missing or broken.
    """
    with loaded_model(config, candidate) as model:
        samples = _samples(model, prompts)
        longest = max(len(sample.prompt_tokens) for sample in samples) + config.data.max_response_length
        episode = partial(single_completion, sampling=model.sampling)
        plan = RolloutPlan(episode, config.rollout.validation.n, config.seed, "generation")
        rows: dict[int, Row] = {}
        together = min(len(samples), config.data.val_batch_size)
        with model.engine(longest, plan.n * together) as engine:
            for start in range(0, len(samples), together):
                jobs = [plan.job(sample) for sample in samples[start : start + together]]
                for [index], batch in run_groups(engine, jobs):
                    rows[start + index] = _row(model, samples[start + index], batch)
                progress(len(rows), len(samples))
        return [rows[index] for index in range(len(samples))]


def _samples(model: LoadedModel, prompts: Sequence[str]) -> list[PromptSample]:
    """Return the prompts of the command line and those of files, numbered together."""
    data = model.config.data
    messages: list[Any] = [[{"role": "user", "content": text}] if model.chats else text for text in prompts]
    places = [f"--prompt {number}" for number in range(1, len(prompts) + 1)]
    tokens = model.renderer.prompt_tokens(messages, places)
    for ids, where in zip(tokens, places):
        check_length(ids, data.max_prompt_length, where)
        check_tokens(ids, model.vocabulary, model.tokenizer, where)
    found = [
        PromptSample(prompt_tokens=ids, messages=model.renderer.messages(one)) for ids, one in zip(tokens, messages)
    ]
    if data.val_files:
        found += load_prompts(data, data.val_files, model.tokenizer, data.val_limit, model.vocabulary)
    if clash := {name for sample in found for name in sample.extra}.intersection(OWN_COLUMNS[1:]):
        raise ConfigError(f"the prompts have a column {min(clash)!r}, which the completions would replace; rename it")
    return [replace(sample, index=number, position=number) for number, sample in enumerate(found)]


def check_length(tokens: Sequence[int], most: int, where: str) -> None:
    """Make sure that a prompt has ``most`` tokens at most.

    Raises:
        DataError: it has more.
    """
    if len(tokens) > most:
        raise DataError(f"{where} has {len(tokens):,} tokens, more than the {most:,} of data.max_prompt_length")


def _row(model: LoadedModel, sample: PromptSample, batch: Batch) -> Row:
    tokens = completion_tokens(batch)
    return {
        **sample.extra,
        "prompt": sample.messages,
        "completions": completion_texts(tokens, model.tokenizer, None),
        "finish_reasons": list(batch["finish_reason"]),
        "completion_tokens": [len(one) for one in tokens],
    }


def check_file(path: Path, overwrite: bool) -> None:
    """Make sure that ``path`` can be written, before anything is generated.

    Raises:
        ConfigError: it exists, or has an unknown ending.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--out {path}: the ending is {path.suffix!r}; known are {' and '.join(SUFFIXES)}")
    if path.exists() and not (overwrite and path.is_file()):
        raise ConfigError(f"--out {path} exists already: name another file, or give --overwrite")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a Parquet or JSONL file, which appears when it is complete.

    Raises:
        DataError: it cannot be written, or its columns have no common type (JSONL needs none).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with boundary(f"{path} cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                import pyarrow as pa
                import pyarrow.parquet as pq

                pq.write_table(pa.Table.from_pylist(list(rows)), temporary)
            else:
                temporary.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
