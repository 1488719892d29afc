"""Prompts for reinforcement learning, tokenised and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt
from rlcore_recipes.data.files import Row, column, read_files, require_columns
from rlcore_recipes.data.settings import DataSettings


@dataclass(frozen=True)
class PromptSample:
    """One prompt.

    Attributes:
        prompt_tokens: token ids, generation prompt included.
        messages: the conversation; one user message for plain text.
        extra: the row's other columns, with those of a struct ``extra_info`` beside them.
        index: position in its data set.
        position: how many samples the loader drew before this one in the whole run, from which its seed derives;
            `PromptLoader` sets it, until then it equals ``index``.
    """

    prompt_tokens: list[int]
    messages: list[Message]
    ground_truth: Any = None
    data_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    index: int = 0
    position: int = 0


@dataclass(frozen=True)
class PromptDataset(Sequence[PromptSample]):
    """Prompts of one or several files, in order.

    Attributes:
        file_sizes: prompts per file, without the filtered ones.
        filtered: over-long prompts left out.
    """

    samples: list[PromptSample]
    file_sizes: list[int]
    filtered: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> PromptSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptSample]: ...
    def __getitem__(self, index: int | slice) -> PromptSample | list[PromptSample]:
        return self.samples[index]


def load_prompts(
    settings: DataSettings, files: Sequence[str], tokenizer: Any, limit: int | None = None
) -> PromptDataset:
    """Read and tokenise prompts.

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        tokenizer: see `rlcore_recipes.data.tokenizer.load_tokenizer`.
        limit: read only the first rows of all files together (``settings.val_limit``).

    Raises:
        DataError: a file or column is missing, a prompt is null or empty, chat messages meet a tokenizer without chat
            template, a prompt is too long under ``overlong_prompts=error``, or no prompt of a file is short enough.
    """
    renderer = Renderer(settings, tokenizer)
    samples: list[PromptSample] = []
    sizes: list[int] = []
    rows_read = 0
    for file, rows in read_files(files, limit):
        rows_read += len(rows)
        new = _file_samples(settings, renderer, rows, file, first_index=len(samples))
        sizes.append(len(new))
        samples += new
    return PromptDataset(samples, sizes, filtered=rows_read - len(samples))


def _file_samples(
    settings: DataSettings, renderer: Renderer, rows: list[Row], file: str, first_index: int
) -> list[PromptSample]:
    keys = {
        "data.prompt_key": settings.prompt_key,
        "data.ground_truth_key": settings.ground_truth_key,
        "data.data_source_key": settings.data_source_key,
    }
    require_columns(rows, keys, file)
    prompts = [as_prompt(column(row, settings.prompt_key), f"{file}, row {number}") for number, row in enumerate(rows)]
    tokens = renderer.prompt_tokens(prompts)
    too_long = [number for number, ids in enumerate(tokens) if len(ids) > settings.max_prompt_length]
    if too_long and settings.overlong_prompts == "error":
        raise DataError(
            f"{file}, row {too_long[0]}: the prompt has {len(tokens[too_long[0]])} tokens, more than "
            f"data.max_prompt_length={settings.max_prompt_length} ({len(too_long)} of {len(rows)} rows do); raise it, "
            "or leave them out with data.overlong_prompts=filter"
        )
    if len(too_long) == len(rows):
        raise DataError(
            f"none of the {len(rows)} prompts of {file} fits data.max_prompt_length={settings.max_prompt_length}: the "
            f"shortest has {min(map(len, tokens))} tokens"
        )
    kept = sorted(set(range(len(rows))) - set(too_long))
    return [
        PromptSample(
            prompt_tokens=tokens[number],
            messages=renderer.messages(prompts[number]),
            ground_truth=column(rows[number], settings.ground_truth_key) if settings.ground_truth_key else None,
            data_source=_data_source(settings, rows[number], file),
            extra=_extra(settings, rows[number]),
            index=first_index + offset,
            position=first_index + offset,
        )
        for offset, number in enumerate(kept)
    ]


def _data_source(settings: DataSettings, row: Row, file: str) -> str:
    return str(column(row, settings.data_source_key)) if settings.data_source_key else Path(file).stem


def _extra(settings: DataSettings, row: Row) -> dict[str, Any]:
    named = {settings.prompt_key, settings.ground_truth_key, settings.data_source_key, "extra_info"}
    extra_info = row.get("extra_info")
    return {
        **{name: value for name, value in row.items() if name not in named},
        **(extra_info if isinstance(extra_info, dict) else {}),
    }
