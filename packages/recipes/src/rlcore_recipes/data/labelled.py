"""Single answers that are known to be good or bad, and rows to estimate a KL divergence from."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Renderer, as_prompt
from rlcore_recipes.data.columns import Row, column, data_source
from rlcore_recipes.data.encoding import encode_answers, is_chat
from rlcore_recipes.data.files import DataFile
from rlcore_recipes.data.layouts import CHOSEN, COMPLETION, LABEL, PROMPT, SOURCE, labelled_columns
from rlcore_recipes.data.preferences import PairReader, Side, as_side, is_empty
from rlcore_recipes.data.sample_data import SampleDataset, read_samples
from rlcore_recipes.data.settings import PreferenceDataSettings

NO_ANSWER = "with an empty answer"
NO_LABEL = "with a label that is neither true nor false"
GOOD, BAD, MISMATCHED = 0, 1, 2
"""Values of the column ``side``."""


@dataclass(frozen=True)
class LabelledAnswer:
    """A prompt with an answer.

    Attributes:
        start: position of the answer's first token.
        number: of the sample among those that were read.
    """

    side: Side
    start: int
    good: bool
    source: str
    number: int


@dataclass(frozen=True)
class LabelledDataset(SampleDataset[LabelledAnswer]):
    """Answers with labels.

    Attributes:
        partners: for each sample that was read another one with a different answer; None if no KL divergence is
            estimated.
        read: the samples in the order in which they were read.
        max_length: tokens of a prompt with its partner's answer, whose end is cut off.
    """

    partners: Sequence[int] | None = None
    read: Sequence[LabelledAnswer] = ()
    max_length: int = 0

    def take(self, indices: Iterable[int]) -> Batch:
        """Return answers as a batch: a row each and, with `partners`, a second one with the partner's answer.

        Its columns are ``tokens`` (jagged int64), ``loss_mask`` (jagged float32, 1 on the answer's tokens), ``pair``
        (int64: number of the sample in the batch), ``side`` (int64: `GOOD`, `BAD`, `MISMATCHED`) and ``data_source``.
        """
        rows: list[tuple[Side, int, int, str]] = []
        for number, index in enumerate(indices):
            sample = self.samples[index]
            rows.append((sample.side, number, GOOD if sample.good else BAD, sample.source))
            if self.partners is not None:
                mismatched = self._mismatched(sample, self.read[self.partners[sample.number]])
                rows.append((mismatched, number, MISMATCHED, sample.source))
        sides, numbers, kinds, sources = zip(*rows)
        return Batch(
            {
                "tokens": Jagged.from_list([side.tokens for side in sides], dtype=torch.int64),
                "loss_mask": Jagged.from_list([side.mask for side in sides], dtype=torch.float32),
                "pair": torch.tensor(numbers),
                "side": torch.tensor(kinds),
                "data_source": list(sources),
            }
        )

    def _mismatched(self, sample: LabelledAnswer, partner: LabelledAnswer) -> Side:
        """Return the prompt of ``sample`` with the answer of ``partner``."""
        tokens = sample.side.tokens[: sample.start] + partner.side.tokens[partner.start :]
        mask = sample.side.mask[: sample.start] + partner.side.mask[partner.start :]
        return Side(tokens[: self.max_length], mask[: self.max_length])


def load_labelled(
    settings: PreferenceDataSettings,
    files: Sequence[str],
    tokenizer: Any,
    limit: int | None = None,
    vocabulary: int | None = None,
    *,
    mismatched: bool,
) -> LabelledDataset:
    """Read and tokenise answers with labels; of a file of pairs, both answers.

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        limit: read only the first rows of all files together (``settings.val_limit``).
        vocabulary: tokens that the model knows; None does not check that it knows those of the samples.
        mismatched: make rows with answers to other prompts too.

    Raises:
        DataError: as `rlcore_recipes.data.preferences.load_pairs`; also answers that are all the same, if
            ``mismatched``.
    """
    pairs = PairReader(settings, Renderer(settings, tokenizer), vocabulary, what="sample")
    reader = _Reader(pairs)
    read = read_samples(files, labelled_columns(settings), limit, settings.max_length, reader.samples, pairs.left_out)
    return LabelledDataset(
        **pairs.fields(read),
        partners=partners_of(reader.prompts, reader.answers) if mismatched else None,
        read=read.samples,
        max_length=settings.max_length,
    )


@dataclass
class _Reader:
    """Makes answers with labels of rows.

    Attributes:
        pairs: reads sides, and counts what is left out.
        prompts: a hash of each sample's prompt, and ``answers`` of its answer.
    """

    pairs: PairReader
    prompts: array[int] = field(default_factory=lambda: array("q"))
    answers: array[int] = field(default_factory=lambda: array("q"))

    def samples(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[LabelledAnswer]:
        """Yield the samples of rows, without those that are left out."""
        read = self._pairs if CHOSEN in file.columns.keys else self._rows
        for side, good, source in read(file, rows, places):
            start = side.mask.index(1)
            self.prompts.append(hash(side.tokens[:start].tobytes()))
            self.answers.append(hash(side.tokens[start:].tobytes()))
            yield LabelledAnswer(side, start, good, source, len(self.answers) - 1)

    def _pairs(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[tuple[Side, bool, str]]:
        for pair in self.pairs.pairs(file, rows, places):
            yield pair.chosen, True, pair.source
            yield pair.rejected, False, pair.source

    def _rows(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[tuple[Side, bool, str]]:
        keys, reader = file.columns.keys, self.pairs
        kept: list[tuple[Any, Any, bool, str, str]] = []
        for row, where in zip(rows, places):
            prompt = as_prompt(column(row, str(keys[PROMPT])), where, file.padded)
            answer = as_side(column(row, str(keys[COMPLETION])), f"{where}, column {keys[COMPLETION]!r}", file.padded)
            label = column(row, str(keys[LABEL]))
            if not isinstance(label, bool | int) or label not in (0, 1):
                reader.leave_out(NO_LABEL, where)
            elif is_empty(answer):
                reader.leave_out(NO_ANSWER, where)
            else:
                name = data_source(row, keys[SOURCE], where, Path(file.name).stem)
                kept.append((prompt, answer, bool(label), name, where))
        if not kept:
            return
        prompts, answers, labels, names, used = map(list, zip(*kept))
        reader.chat = reader.chat or any(map(partial(is_chat, reader.renderer), prompts, answers))
        for encoded, label, name, where in zip(
            encode_answers(reader.renderer, prompts, answers, used), labels, names, used
        ):
            side = reader.side(encoded, where)
            if side is None:
                reader.overlong += 1
            elif not any(side.mask):
                reader.leave_out(NO_ANSWER, where)
            else:
                yield side, label, name


def partners_of(prompts: Sequence[int], answers: Sequence[int]) -> Sequence[int]:
    """Return for each sample the next one, from the end on to the beginning, with another prompt and another answer.

    Where there is none among many, or all prompts are the same, the prompt may be the same; the answer never is.

    Raises:
        DataError: all answers are the same.
    """
    if len({*answers}) < 2:
        raise DataError(
            "all answers of the data set are the same, and the KL divergence is estimated from answers to other "
            "prompts; take another loss, such as apo-zero-unpaired"
        )
    by_answer = _next_other(answers)
    by_prompt = _next_other(prompts) if len({*prompts}) > 1 else None
    return array("q", [_partner(index, prompts, answers, by_prompt, by_answer) for index in range(len(answers))])


def _partner(
    index: int,
    prompts: Sequence[int],
    answers: Sequence[int],
    by_prompt: Sequence[int] | None,
    by_answer: Sequence[int],
) -> int:
    """Return the partner of sample ``index``: over runs of the same prompt and of the same answer."""
    other = by_answer[index]
    if by_prompt is None:
        return other
    for _ in range(64):
        if prompts[other] == prompts[index]:
            other = by_prompt[other]
        elif answers[other] == answers[index]:
            other = by_answer[other]
        else:
            return other
    return by_answer[index]


def _next_other(values: Sequence[int]) -> Sequence[int]:
    """Return for each place that of the next different value, from the end on to the beginning."""
    size = len(values)
    found = array("q", [0]) * size
    following = 0
    for place in reversed(range(2 * size)):  # twice: what follows the last value is known in the second round
        if values[place % size] != values[(place + 1) % size]:
            following = (place + 1) % size
        found[place % size] = following
    return found
