"""Answers with labels that a reward model is to predict: one at the end of an answer, or one for each of its steps."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Renderer, as_prompt
from rlcore_recipes.data.columns import Row, column, data_source
from rlcore_recipes.data.encoding import Encoded, Prompt, encode_answers, is_chat
from rlcore_recipes.data.files import DataFile
from rlcore_recipes.data.layouts import PROMPT, RESPONSE, SOURCE, STEP_LABELS, STEPS, label_place, scored_columns
from rlcore_recipes.data.preferences import PairReader, Side, as_side, is_empty
from rlcore_recipes.data.sample_data import SampleDataset, read_samples
from rlcore_recipes.data.settings import RewardDataSettings
from rlcore_recipes.data.steps import step_ends

EMPTY = "with an empty answer"
NO_LABEL = "without a label"
OTHER_STEPS = "whose steps are not found in the tokens of the answer (a step holds the separator, or has no text)"


@dataclass(frozen=True)
class ScoredAnswer:
    """A prompt with an answer, and labels at some of its tokens.

    Attributes:
        positions: of the tokens with a label.
        labels: of each position, one for each output of the model; NaN where one has none.
    """

    tokens: array[int]
    positions: array[int]
    labels: array[float]
    source: str


@dataclass(frozen=True)
class ScoredDataset(SampleDataset[ScoredAnswer]):
    """Answers with labels.

    Attributes:
        outputs: labels of a token.
    """

    outputs: int = 1

    def take(self, indices: Iterable[int]) -> Batch:
        """Return answers as a batch, a row each.

        Its columns are ``tokens`` (jagged int64), ``loss_mask`` (jagged float32, 1 on tokens with a label), ``labels``
        (jagged float32 ``[T]``, or ``[T, outputs]`` of a model with several; NaN where there is none) and
        ``data_source``.
        """
        rows = [self.samples[index] for index in indices]
        lengths = torch.tensor([len(row.tokens) for row in rows])
        mask = torch.zeros(int(lengths.sum()))
        labels = torch.full((len(mask), self.outputs), math.nan)
        starts = [0, *lengths.cumsum(0).tolist()]
        places = torch.tensor([start + place for start, row in zip(starts, rows) for place in row.positions])
        mask[places] = 1
        labels[places] = torch.tensor([label for row in rows for label in row.labels]).view(-1, self.outputs)
        return Batch(
            {
                "tokens": Jagged.from_list([row.tokens for row in rows], dtype=torch.int64),
                "loss_mask": Jagged(mask, lengths),
                "labels": Jagged(labels if self.outputs > 1 else labels[:, 0], lengths),
                "data_source": [row.source for row in rows],
            }
        )


def load_scored_answers(
    settings: RewardDataSettings,
    files: Sequence[str],
    tokenizer: Any,
    limit: int | None = None,
    vocabulary: int | None = None,
    *,
    probabilities: bool,
) -> ScoredDataset:
    """Read and tokenise answers with labels.

    Rows with an empty answer, without a label, or whose steps are not found are left out and counted in the data set's
    notes, or refused (``settings.unusable``).

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        limit: read only the first rows of all files together (``settings.val_limit``).
        vocabulary: tokens that the model knows; None does not check that it knows those of the samples.
        probabilities: labels are from 0 to 1.

    Raises:
        DataError: as `rlcore_recipes.data.preferences.load_pairs`; also a label of the wrong type or range, or steps
            and labels that differ in number.
    """
    sides = PairReader(settings, Renderer(settings, tokenizer), vocabulary, what="sample")
    reader = _Reader(settings, sides, probabilities)
    read = read_samples(files, scored_columns(settings), limit, settings.max_length, reader.samples, sides.left_out)
    return ScoredDataset(**sides.fields(read), outputs=len(settings.label_key))


@dataclass
class _Reader:
    """Makes answers with labels of rows.

    Attributes:
        sides: cuts answers to their length, and counts what is left out.
    """

    settings: RewardDataSettings
    sides: PairReader
    probabilities: bool

    def samples(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[ScoredAnswer]:
        """Yield the samples of rows, without those that are left out."""
        kept = list(self._answers(file, rows, places))
        if not kept:
            return
        prompts, answers, labels, kept_rows, used = map(list, zip(*kept))
        self.sides.chat = self.sides.chat or any(map(partial(is_chat, self.sides.renderer), prompts, answers))
        encoded = encode_answers(self.sides.renderer, prompts, answers, used)
        by_step = STEPS in file.columns.keys
        for one, values, row, where in zip(encoded, labels, kept_rows, used):
            side = self.sides.side(one, where)
            positions = self._positions(one, side, len(values), by_step)
            if positions is None:
                self.sides.leave_out(OTHER_STEPS, where)
            elif side is None:
                self.sides.overlong += 1
                self.sides.first_overlong = self.sides.first_overlong or where
            else:
                name = data_source(row, file.columns.keys[SOURCE], where, Path(file.name).stem)
                yield from self._sample(side, positions, values, name, where)

    def _sample(
        self, side: Side, positions: Sequence[int], labels: Sequence[Sequence[float]], source: str, where: str
    ) -> Iterator[ScoredAnswer]:
        """Yield the sample, unless no label is left within the maximum length."""
        within = range(len(side.tokens))
        labelled = [both for both in zip(positions, labels) if both[0] in within and not all(map(math.isnan, both[1]))]
        if not labelled:
            self.sides.leave_out(NO_LABEL, where)
            return
        places, values = zip(*labelled)
        yield ScoredAnswer(side.tokens, array("i", places), array("d", chain.from_iterable(values)), source)

    def _answers(
        self, file: DataFile, rows: list[Row], places: list[str]
    ) -> Iterator[tuple[Prompt, Prompt, list[list[float]], Row, str]]:
        """Yield prompt, answer, labels at each labelled token, row and place of the rows that have an answer."""
        keys = file.columns.keys
        for row, where in zip(rows, places):
            prompt = as_prompt(column(row, str(keys[PROMPT])), where, file.padded)
            if STEPS in keys:
                answer, labels = self._steps(row, str(keys[STEPS]), str(keys[STEP_LABELS]), where)
            else:
                response = str(keys[RESPONSE])
                answer = as_side(column(row, response), f"{where}, column {response!r}", file.padded)
                columns = [str(keys[label_place(number)]) for number in range(len(self.settings.label_key))]
                labels = [[self._label(column(row, key), f"{where}, column {key!r}") for key in columns]]
            if is_empty(answer):
                self.sides.leave_out(EMPTY, where)
            else:
                yield prompt, answer, labels, row, where

    def _steps(self, row: Row, key: str, labels_key: str, where: str) -> tuple[Prompt, list[list[float]]]:
        """Return the text of all steps, and their labels."""
        steps, labels = column(row, key), column(row, labels_key)
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise DataError(f"{where}: column {key!r} must hold a list of texts, the steps, not {steps!r:.100}")
        if not isinstance(labels, list) or len(labels) != len(steps):
            found = f"{len(labels)} labels" if isinstance(labels, list) else f"{labels!r:.100}"
            raise DataError(
                f"{where}: column {labels_key!r} must hold a list with a label for each of the {len(steps)} steps, not "
                f"{found}"
            )
        place = f"{where}, column {labels_key!r}"
        return self.settings.step_separator.join(steps), [[self._label(label, place)] for label in labels]

    def _label(self, value: Any, where: str) -> float:
        """Return a label as a number, NaN for null."""
        if value is None:
            return math.nan
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise DataError(f"{where}: a label must be true, false or a finite number, not {value!r:.100}")
        if self.probabilities and not 0 <= value <= 1:
            raise DataError(
                f"{where}: a label is {value!r:.100}, and actor.objective.loss=bce takes labels from 0 to 1; convert "
                "them, or take mse"
            )
        return float(value)

    def _positions(self, encoded: Encoded, side: Side | None, labels: int, by_step: bool) -> list[int] | None:
        """Return the positions of the tokens that the labels belong to; None if there are more or fewer steps."""
        if not by_step:
            return [] if side is None else [len(side.tokens) - 1]
        learned = [place for place, is_learned in enumerate(encoded[1]) if is_learned]
        answer = [encoded[0][place] for place in learned]
        ends = step_ends(answer, self.sides.renderer.tokenizer, self.settings.step_separator)
        return [learned[end] for end in ends] if len({*ends}) == labels else None
