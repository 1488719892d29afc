"""Prompts for reinforcement learning, tokenised and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt
from rlcore_recipes.data.columns import Columns, Row, column, data_source
from rlcore_recipes.data.end_tokens import check_tokens, written_ends
from rlcore_recipes.data.files import fingerprint, pads_with_nulls, read_files
from rlcore_recipes.data.settings import DataSettings


@dataclass(frozen=True)
class PromptSample:
    """One prompt.

    Attributes:
        prompt_tokens: token ids, generation prompt included.
        messages: the conversation; one user message for plain text.
        extra: the row's other columns, and the fields of a struct ``extra_info``.
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
        fingerprints: of what each file holds.
        ends: tokens that end an answer in texts of the tokenizer (see `written_ends`).
    """

    samples: list[PromptSample]
    file_sizes: list[int]
    filtered: int = 0
    fingerprints: Sequence[str] = ()
    ends: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> PromptSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptSample]: ...
    def __getitem__(self, index: int | slice) -> PromptSample | list[PromptSample]:
        return self.samples[index]


def load_prompts(
    settings: DataSettings,
    files: Sequence[str],
    tokenizer: Any,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> PromptDataset:
    """Read and tokenise prompts.

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        tokenizer: see `rlcore_recipes.data.tokenizer.load_tokenizer`.
        limit: read only the first rows of all files together (``settings.val_limit``).
        vocabulary: tokens that the model knows; None does not check that it knows those of the prompts.

    Raises:
        DataError: a file or column is missing or cannot be read, a prompt is null or empty, holds something else than
            text or a token that the model does not know, the chat template is missing or fails, a prompt is too long
            under ``overlong_prompts=error``, or no prompt of a file is short enough.
    """
    renderer = Renderer(settings, tokenizer)
    keys = {
        "data.prompt_key": settings.prompt_key,
        "data.ground_truth_key": settings.ground_truth_key,
        "data.data_source_key": settings.data_source_key,
    }
    samples: list[PromptSample] = []
    sizes: list[int] = []
    prints: list[str] = []
    rows_read = 0
    chat = False
    for file, rows in read_files(files, Columns(keys), limit):
        rows_read += len(rows)
        new = _file_samples(settings, renderer, rows, file, vocabulary, first_index=len(samples))
        chat = chat or any(renderer.is_chat(column(row, settings.prompt_key)) for row in rows)
        sizes.append(len(new))
        prints.append(fingerprint(rows, file))
        samples += new
    ends = written_ends(renderer, chat)
    return PromptDataset(samples, sizes, filtered=rows_read - len(samples), fingerprints=prints, ends=ends)


def _file_samples(
    settings: DataSettings, renderer: Renderer, rows: list[Row], file: str, vocabulary: int | None, first_index: int
) -> list[PromptSample]:
    places = [f"{file}, row {number}" for number in range(len(rows))]
    padded = pads_with_nulls(file)
    prompts = [as_prompt(column(row, settings.prompt_key), where, padded) for row, where in zip(rows, places)]
    tokens = renderer.prompt_tokens(prompts, places)
    for ids, where in zip(tokens, places):
        check_tokens(ids, vocabulary, renderer.tokenizer, where)
    return [
        PromptSample(
            prompt_tokens=tokens[number],
            messages=renderer.messages(prompts[number]),
            ground_truth=column(rows[number], settings.ground_truth_key) if settings.ground_truth_key else None,
            data_source=data_source(rows[number], settings.data_source_key, places[number], Path(file).stem),
            extra=_extra(settings, rows[number]),
            index=first_index + offset,
            position=first_index + offset,
        )
        for offset, number in enumerate(_short_enough(settings, tokens, file))
    ]


def _short_enough(settings: DataSettings, tokens: list[list[int]], file: str) -> list[int]:
    """Return the rows whose prompts are not too long.

    Raises:
        DataError: there are none, or there are others and those are an error.
    """
    too_long = [number for number, ids in enumerate(tokens) if len(ids) > settings.max_prompt_length]
    if too_long and settings.overlong_prompts == "error":
        raise DataError(
            f"{file}, row {too_long[0]}: the prompt has {len(tokens[too_long[0]])} tokens, more than "
            f"data.max_prompt_length={settings.max_prompt_length} ({len(too_long)} of {len(tokens)} rows do); raise "
            "it, or leave them out with data.overlong_prompts=filter"
        )
    if len(too_long) == len(tokens):
        raise DataError(
            f"none of the {len(tokens)} prompts of {file} fits data.max_prompt_length={settings.max_prompt_length}: "
            f"the shortest has {min(map(len, tokens))} tokens"
        )
    return sorted(set(range(len(tokens))) - set(too_long))


def _extra(settings: DataSettings, row: Row) -> dict[str, Any]:
    named = {settings.prompt_key, settings.ground_truth_key, settings.data_source_key, "extra_info"}
    extra_info = row.get("extra_info")
    return {
        **{name: value for name, value in row.items() if name not in named},
        **(extra_info if isinstance(extra_info, dict) else {}),
    }
