"""Supervised samples: tokens, and which of them are learned."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Renderer, as_prompt
from rlcore_recipes.data.columns import Row, column, data_source
from rlcore_recipes.data.encoding import (
    Encoded,
    as_answer,
    encode_answers,
    encode_conversations,
    encode_texts,
    is_chat,
)
from rlcore_recipes.data.end_tokens import check_tokens, written_ends
from rlcore_recipes.data.files import DataFile
from rlcore_recipes.data.layouts import MESSAGES, PROMPT, RESPONSE, SOURCE, TEXT, sft_columns
from rlcore_recipes.data.sample_data import SampleDataset, read_samples
from rlcore_recipes.data.settings import SFTDataSettings
from rlcore_recipes.data.template_variables import template_variables


@dataclass(frozen=True)
class SFTSample:
    """One sample: ``mask`` is 1 on tokens that are learned."""

    tokens: array[int]
    mask: bytes
    source: str


@dataclass(frozen=True)
class SFTDataset(SampleDataset[SFTSample]):
    """Supervised samples."""

    def take(self, indices: Iterable[int]) -> Batch:
        """Return samples as a batch, a row each.

        Its columns are ``tokens`` (jagged int64), ``loss_mask`` (jagged float32, 1 on tokens that are learned: answers
        and the end token after them) and ``data_source``.
        """
        rows = [self.samples[index] for index in indices]
        return Batch(
            {
                "tokens": Jagged.from_list([row.tokens for row in rows], dtype=torch.int64),
                "loss_mask": Jagged.from_list([row.mask for row in rows], dtype=torch.float32),
                "data_source": [row.source for row in rows],
            }
        )


def load_sft(
    settings: SFTDataSettings,
    files: Sequence[str],
    tokenizer: Any,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> SFTDataset:
    """Read and tokenise supervised samples.

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        limit: read only the first rows of all files together (``settings.val_limit``).
        vocabulary: tokens that the model knows; None does not check that it knows those of the samples.

    Raises:
        DataError: as `rlcore_recipes.data.prompts.load_prompts`; also a null response, a conversation without an
            assistant turn, a chat template that rewrites earlier turns, or several columns to learn from.
    """
    reader = _Reader(settings, Renderer(settings, tokenizer), vocabulary)
    read = read_samples(files, sft_columns(settings), limit, settings.max_length, reader.samples)
    return SFTDataset(
        read.samples,
        read.file_sizes,
        filtered=read.left_out,
        fingerprints=read.fingerprints,
        ends=written_ends(reader.renderer, reader.chat),
        notes=[*read.notes, *reader.notes()],
        first_filtered=reader.first_left_out,
    )


@dataclass
class _Reader:
    """Makes samples of rows.

    Attributes:
        chat: whether the chat template was used.
        tokens: those of all samples so far.
        learned: those of them that are learned.
        cut: samples of which the end was cut off.
        first_left_out: file and row of the first sample that was left out.
    """

    settings: SFTDataSettings
    renderer: Renderer
    vocabulary: int | None
    chat: bool = False
    tokens: int = 0
    learned: int = 0
    cut: int = 0
    first_left_out: str = ""

    def notes(self) -> list[str]:
        """Return what happened to the samples, for the user."""
        cut = [f"{self.cut:,} samples are cut to data.max_length={self.settings.max_length}"] if self.cut else []
        return [*cut, f"{self.learned / max(self.tokens, 1):.1%} of {self.tokens:,} tokens are learned"]

    def samples(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[SFTSample]:
        """Yield the samples of rows, without those that are too long."""
        settings, source = self.settings, file.columns.keys[SOURCE]
        for row, where, (ids, mask) in zip(rows, places, self._encoded(file, rows, places)):
            check_tokens(ids, self.vocabulary, self.renderer.tokenizer, where)
            if not any(mask):
                raise DataError(
                    f"{where}: no token of this sample would be learned: its answers are empty under the chat template"
                )
            if len(ids) > settings.max_length:
                if settings.overlong == "error":
                    raise DataError(
                        f"{where}: the sample has {len(ids)} tokens, more than data.max_length={settings.max_length}; "
                        "raise it, or set data.overlong to filter or truncate"
                    )
                ids, mask = ids[: settings.max_length], mask[: settings.max_length]
                if settings.overlong == "filter" or not any(mask):
                    self.first_left_out = self.first_left_out or where
                    continue
                self.cut += 1
            self.tokens += len(ids)
            self.learned += int(sum(mask))
            name = data_source(row, source, where, Path(file.name).stem)
            yield SFTSample(array("i", ids), bytes(map(int, mask)), name)

    def _encoded(self, file: DataFile, rows: list[Row], places: list[str]) -> list[Encoded]:
        """Return tokens and loss mask of rows, in the form that the file's columns have."""
        keys = file.columns.keys
        if (key := keys.get(TEXT)) is not None:
            return encode_texts(self.renderer, [column(row, key) for row in rows], places)
        key = keys.get(MESSAGES) or keys[PROMPT]
        assert key is not None
        prompts = [as_prompt(column(row, key), where, file.padded) for row, where in zip(rows, places)]
        variables = [template_variables(row, where, file.padded) for row, where in zip(rows, places)]
        if key == keys.get(MESSAGES):
            self.chat = True
            return encode_conversations(self.renderer, prompts, places, key, self.settings.learn, variables)
        response = keys[RESPONSE]
        assert response is not None
        answers = [as_answer(column(row, response), where, file.padded) for row, where in zip(rows, places)]
        self.chat = self.chat or any(map(partial(is_chat, self.renderer), prompts, answers))
        return encode_answers(self.renderer, prompts, answers, places, self.settings.learn, variables)
