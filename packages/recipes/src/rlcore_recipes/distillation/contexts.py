"""The context in which a teacher sees a completion: its own prompt, and the student's completion, token for token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt
from rlcore_recipes.data.columns import column
from rlcore_recipes.settings.distillation import TeacherSettings

Prompt = str | list[Message]

CONTEXT_COLUMNS = ("messages", "prompt_text", "ground_truth", "data_source", "extra")
"""The columns of a batch from which the prompts of a teacher are made."""


def teacher_prompts(
    rows: Sequence[Mapping[str, Any]], teacher: TeacherSettings, renderer: Renderer, places: Sequence[str]
) -> list[list[int]]:
    """Return the token ids of the teacher's prompts, which are never cut.

    Args:
        rows: `CONTEXT_COLUMNS` of each sample.
        renderer: of the teacher's tokenizer and chat template.
        places: names of the rows in errors.

    Raises:
        DataError: a row lacks what the prompt is made of, or the chat template refuses it.
    """
    prompts = [_prompt(row, teacher, where) for row, where in zip(rows, places)]
    return renderer.prompt_tokens(prompts, places)


def _prompt(row: Mapping[str, Any], teacher: TeacherSettings, where: str) -> Prompt:
    if teacher.prompt_key is not None:
        value = column(row["extra"], teacher.prompt_key)
        if value is None:
            raise DataError(f"{where}: the column {teacher.prompt_key!r}, the teacher's prompt, is missing or null")
        return as_prompt(value, f"{where}, {teacher.prompt_key}")
    own: Prompt = row["messages"] if row["prompt_text"] is None else row["prompt_text"]
    if teacher.prompt_template is None:
        return own
    if isinstance(own, str):
        return _filled(teacher.prompt_template, own, row, where)
    last = {**own[-1], "content": _filled(teacher.prompt_template, own[-1]["content"], row, where)}
    return [*own[:-1], last]  # shift allowed: messages


def _filled(template: str, prompt: str, row: Mapping[str, Any], where: str) -> str:
    """Return ``template`` with the values of the fields that it names; braces in values stay as they are."""
    known = {**row["extra"], **{name: row[name] for name in ("ground_truth", "data_source")}, "prompt": prompt}
    parts = []
    for text, name, _, _ in Formatter().parse(template):
        parts.append(text)
        if name is None:
            continue
        value = column(known, name)
        if value is None:
            raise DataError(
                f"{where}: the teacher's prompt_template names {{{name}}}, which is missing or null; there are "
                f"{', '.join(sorted(key for key, found in known.items() if found is not None))}"
            )
        parts.append(str(value))
    return "".join(parts)


def in_context(batch: Batch, prompts: Sequence[Sequence[int]]) -> Batch:
    """Return ``tokens`` and ``loss_mask`` with ``prompts`` in the place of the samples' own; completions stay."""
    tokens, mask = [], []
    columns = zip(batch["tokens"].to_list(), batch["loss_mask"].to_list(), batch["prompt_length"].tolist(), prompts)
    for own, trained, start, prompt in columns:
        tokens.append(torch.cat([torch.tensor(prompt, dtype=torch.int64), own[start:]]))
        mask.append(torch.cat([torch.zeros(len(prompt)), trained[start:]]))
    return Batch({"tokens": Jagged.from_list(tokens), "loss_mask": Jagged.from_list(mask)})


def rendered(batch: Batch, teacher: TeacherSettings, renderer: Renderer) -> Batch:
    """Return the samples of ``batch`` in the context of ``teacher``."""
    rows = list(batch.select(*CONTEXT_COLUMNS).rows())
    places = [f"prompt {position}" for position in batch["group"].tolist()]
    return in_context(batch, teacher_prompts(rows, teacher, renderer, places))


def onto_samples(found: Batch, batch: Batch) -> Batch:
    """Return the per-token columns of ``found``, which is in a teacher's context, over the tokens of ``batch``."""
    ends = batch.lengths - batch["prompt_length"]
    moved = {}
    for name in found.jagged_names:
        rows = zip(found[name].to_list(), ends.tolist(), batch["prompt_length"].tolist())
        moved[name] = Jagged.from_list(
            [
                torch.cat([values.new_zeros(start, *values.shape[1:]), values[len(values) - count :]])
                for values, count, start in rows
            ]
        )
    return Batch(moved)
