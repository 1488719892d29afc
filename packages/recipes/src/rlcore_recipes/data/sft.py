"""Supervised samples: tokens, and which of them are learned."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.arrow_data import is_tokenized
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
from rlcore_recipes.data.layouts import INPUT_IDS, LOSS_MASK, MESSAGES, PROMPT, RESPONSE, SOURCE, TEXT, sft_columns
from rlcore_recipes.data.pretokenized import read_tokens
from rlcore_recipes.data.sample_data import SampleDataset, read_samples
from rlcore_recipes.data.settings import SFTDataSettings
from rlcore_recipes.data.sft_sample import Joined, SFTSample
from rlcore_recipes.data.template_variables import template_variables
from rlcore_recipes.data.tokenized import Report, TokenizedFile, cached, open_tokenized, tokenizer_fingerprint


@dataclass(frozen=True)
class SFTDataset(SampleDataset[SFTSample]):
    """Supervised samples."""

    def take(self, indices: Iterable[int]) -> Batch:
        """Return samples as a batch, a row each.

        Its columns are ``tokens`` (jagged int64), ``loss_mask`` (jagged float32, 1 on tokens that are learned: answers
        and the end token after them) and ``data_source``.
        """
        rows = [self.samples[index] for index in indices]
        lengths = torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64)
        tokens = np.concatenate([np.frombuffer(row.tokens, np.int32) for row in rows]).astype(np.int64)
        mask = np.frombuffer(b"".join(row.mask for row in rows), np.uint8).astype(np.float32)
        return Batch(
            {
                "tokens": Jagged(torch.from_numpy(tokens), lengths),
                "loss_mask": Jagged(torch.from_numpy(mask), lengths),
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
    """Read and tokenise supervised samples, or open those that were tokenised before.

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        limit: read only the first rows of all files together (``settings.val_limit``).
        vocabulary: tokens that the model knows; None does not check that it knows those of the samples.

    Raises:
        DataError: as `rlcore_recipes.data.prompts.load_prompts`; also a null response, a conversation without an
            assistant turn, a chat template that rewrites earlier turns, or several columns to learn from.
    """
    fingerprint, parts = tokenizer_fingerprint(tokenizer), list[TokenizedFile]()
    for file in files:
        left = None if limit is None else limit - sum(part.report.rows for part in parts)
        if left is not None and left <= 0:
            break
        if is_tokenized(Path(file)):
            parts.append(open_tokenized(Path(file), settings, fingerprint, vocabulary, left))
            continue
        read = partial(tokenise, settings, file, tokenizer, fingerprint, left, vocabulary)
        parts.append(read() if left is not None else cached(file, settings, fingerprint, vocabulary, read))
    reports = [part.report for part in parts]
    return SFTDataset(
        samples=Joined([part.samples for part in parts]),
        file_sizes=[len(part.samples) for part in parts],
        filtered=sum(report.overlong for report in reports),
        first_filtered=next((report.first_overlong for report in reports if report.overlong), ""),
        fingerprints=[report.fingerprint for report in reports],
        ends=written_ends(Renderer(settings, tokenizer), any(report.chat for report in reports)),
        notes=[*(note for report in reports for note in report.notes), *_totals(reports, settings)],
    )


def _totals(reports: Sequence[Report], settings: SFTDataSettings) -> Iterator[str]:
    """Yield what happened to the samples of all files, for the user."""
    if cut := sum(report.cut for report in reports):
        yield f"{cut:,} samples are cut to data.max_length={settings.max_length}"
    if empty := sum(report.empty for report in reports):
        first = next(report.first_empty for report in reports if report.empty)
        yield f"{empty:,} samples without a learned token are left out (the first: {first})"
    tokens = sum(report.tokens for report in reports)
    yield f"{sum(report.learned for report in reports) / max(tokens, 1):.1%} of {tokens:,} tokens are learned"


def tokenise(
    settings: SFTDataSettings,
    file: str,
    tokenizer: Any,
    fingerprint: str,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> TokenizedFile:
    """Read and tokenise the samples of one file; arguments as those of `load_sft`.

    Args:
        fingerprint: of ``tokenizer``.
    """
    reader = _Reader(settings, Renderer(settings, tokenizer), vocabulary)
    read = read_samples([file], sft_columns(settings), limit, settings.max_length, reader.samples)
    report = Report(
        rows=read.file_sizes[0] + read.left_out,
        samples=read.file_sizes[0],
        tokenizer=fingerprint if reader.tokenizes else "",
        fingerprint=read.fingerprints[0],
        notes=read.notes,
        **reader.counts,
    )
    return TokenizedFile(read.samples, report)


class _Reader:
    """Makes samples of rows.

    Attributes:
        counts: fields of `Report` about the samples so far.
        tokenizes: whether the tokenizer was used.
    """

    def __init__(self, settings: SFTDataSettings, renderer: Renderer, vocabulary: int | None) -> None:
        self.settings = settings
        self.renderer = renderer
        self.vocabulary = vocabulary
        self.tokenizes = True
        self.counts: dict[str, Any] = dict.fromkeys(("tokens", "learned", "longest", "largest", "cut"), 0)
        self.counts |= {"overlong": 0, "first_overlong": "", "empty": 0, "first_empty": "", "chat": False}

    def samples(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[SFTSample]:
        """Yield the samples of rows, without those that are too long."""
        settings, source, counts = self.settings, file.columns.keys[SOURCE], self.counts
        for row, where, (ids, mask) in zip(rows, places, self._encoded(file, rows, places)):
            check_tokens(ids, self.vocabulary, self.renderer.tokenizer, where)
            if not any(mask):
                if self.tokenizes:
                    raise DataError(
                        f"{where}: no token of this sample would be learned: its answers are empty under the chat "
                        "template"
                    )
                self._leave_out("empty", where)
                continue
            if len(ids) > settings.max_length:
                if settings.overlong == "error":
                    raise DataError(
                        f"{where}: the sample has {len(ids)} tokens, more than data.max_length={settings.max_length}; "
                        "raise it, or set data.overlong to filter or truncate"
                    )
                ids, mask = ids[: settings.max_length], mask[: settings.max_length]
                if settings.overlong == "filter" or not any(mask):
                    self._leave_out("overlong", where)
                    continue
                counts["cut"] += 1
            counts["tokens"] += len(ids)
            counts["learned"] += int(sum(mask))
            counts["longest"] = max(counts["longest"], len(ids))
            counts["largest"] = max(counts["largest"], *ids)
            name = data_source(row, source, where, Path(file.name).stem)
            yield SFTSample(array("i", ids), bytes(map(int, mask)), name)

    def _leave_out(self, why: str, where: str) -> None:
        self.counts[why] += 1
        self.counts[f"first_{why}"] = self.counts[f"first_{why}"] or where

    def _encoded(self, file: DataFile, rows: list[Row], places: list[str]) -> list[Encoded]:
        """Return tokens and loss mask of rows, in the form that the file's columns have."""
        keys, learn = file.columns.keys, self.settings.learn
        if (key := keys.get(INPUT_IDS)) is not None:
            self.tokenizes = False
            mask_key = keys[LOSS_MASK]
            assert mask_key is not None
            return [read_tokens(row, key, mask_key, where) for row, where in zip(rows, places)]
        if (key := keys.get(TEXT)) is not None:
            return encode_texts(self.renderer, [column(row, key) for row in rows], places)
        key = keys.get(MESSAGES) or keys[PROMPT]
        assert key is not None
        prompts = [as_prompt(column(row, key), where, file.padded) for row, where in zip(rows, places)]
        variables = [template_variables(row, where, file.padded) for row, where in zip(rows, places)]
        if key == keys.get(MESSAGES):
            self.counts["chat"] = True
            return encode_conversations(self.renderer, prompts, places, key, learn, variables)
        response = keys[RESPONSE]
        assert response is not None
        answers = [as_answer(column(row, response), where, file.padded) for row, where in zip(rows, places)]
        self.counts["chat"] |= any(map(partial(is_chat, self.renderer), prompts, answers))
        return encode_answers(self.renderer, prompts, answers, places, learn, variables)
