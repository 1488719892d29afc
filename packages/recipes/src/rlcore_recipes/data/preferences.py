"""Preference pairs: two answers to one prompt, of which one is preferred."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt, as_text
from rlcore_recipes.data.columns import Row, column, data_source, number
from rlcore_recipes.data.encoding import Encoded, Prompt, encode_answers, is_chat
from rlcore_recipes.data.end_tokens import check_tokens, written_ends
from rlcore_recipes.data.files import DataFile
from rlcore_recipes.data.layouts import CHOSEN, MARGIN, PROMPT, REJECTED, SOURCE, pair_columns
from rlcore_recipes.data.left_out import LeftOut
from rlcore_recipes.data.sample_data import ReadSamples, SampleDataset, read_samples
from rlcore_recipes.data.settings import PairDataSettings

Divided = tuple[Prompt, Prompt, Prompt]
"""The prompt, the chosen answer and the rejected one."""

EMPTY = "with an empty side"
EQUAL = "with two equal sides"
NO_ROOM = "whose prompt leaves no room for an answer within data.max_length"
PROMPTS_DIFFER = "with a prompt that differs between the sides"

_UP_TO_SPACE = re.compile(r"(.*\S)\s", re.DOTALL)


@dataclass(frozen=True)
class Side:
    """One answer with its prompt: ``mask`` is 1 on the answer's tokens, the last of which ends the side."""

    tokens: array[int]
    mask: bytes


@dataclass(frozen=True)
class Pair:
    """Two sides; ``margin`` says by how much the chosen one is better, 0 if the data does not tell."""

    chosen: Side
    rejected: Side
    source: str
    margin: float = 0.0


@dataclass(frozen=True)
class PairDataset(SampleDataset[Pair]):
    """Preference pairs."""

    def take(self, indices: Iterable[int]) -> Batch:
        """Return pairs as a batch, two rows each: the chosen side, then the rejected one.

        Its columns are ``tokens`` (jagged int64), ``loss_mask`` (jagged float32, 1 on the answer's tokens), ``pair``
        (int64: number of the pair in the batch), ``side`` (int64: 0 chosen, 1 rejected), ``margin`` (float32, the same
        on both sides) and ``data_source``.
        """
        pairs = [self.samples[index] for index in indices]
        sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
        return Batch(
            {
                "tokens": Jagged.from_list([side.tokens for side in sides], dtype=torch.int64),
                "loss_mask": Jagged.from_list([side.mask for side in sides], dtype=torch.float32),
                "pair": torch.arange(len(pairs)).repeat_interleave(2),
                "side": torch.tensor([0, 1]).repeat(len(pairs)),
                "margin": torch.tensor([pair.margin for pair in pairs], dtype=torch.float32).repeat_interleave(2),
                "data_source": [pair.source for pair in pairs for _ in range(2)],
            }
        )


def load_pairs(
    settings: PairDataSettings,
    files: Sequence[str],
    tokenizer: Any,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> PairDataset:
    """Read and tokenise preference pairs.

    A side longer than ``settings.max_length`` is treated as ``settings.overlong`` says, whatever the length of the
    other one. Pairs that cannot be learned from (an empty side, equal sides, prompts that differ) are left out and
    counted in the data set's notes, or refused (``settings.unusable``).

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        limit: read only the first rows of all files together (``settings.val_limit``).
        vocabulary: tokens that the model knows; None does not check that it knows those of the samples.

    Raises:
        DataError: as `rlcore_recipes.data.sft.load_sft`; also a margin that is no number.
    """
    reader = PairReader(settings, Renderer(settings, tokenizer), vocabulary)
    read = read_samples(files, pair_columns(settings), limit, settings.max_length, reader.pairs, reader.left_out)
    return PairDataset(**reader.fields(read))


@dataclass
class PairReader:
    """Makes pairs of rows.

    Attributes:
        left_out: rows that make no pair, for other reasons than their length.
        overlong: rows with a side that is too long.
        first_overlong: the place of the first one.
        chat: whether the chat template was used.
        what: a row makes, for messages.
    """

    settings: PairDataSettings
    renderer: Renderer
    vocabulary: int | None
    left_out: LeftOut = field(default_factory=LeftOut)
    overlong: int = 0
    first_overlong: str = ""
    chat: bool = False
    what: str = "pair"

    def fields(self, read: ReadSamples[Any]) -> dict[str, Any]:
        """Return the fields of the `SampleDataset` of what was ``read`` with this reader."""
        return {
            "samples": read.samples,
            "file_sizes": read.file_sizes,
            "filtered": self.overlong,
            "fingerprints": read.fingerprints,
            "ends": written_ends(self.renderer, self.chat),
            "notes": [*read.notes, *self.left_out.notes(f"{self.what}s")],
            "first_filtered": self.first_overlong,
        }

    def pairs(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[Pair]:
        """Yield the pairs of rows, without those that are left out."""
        kept = list(self._divided(file, rows, places))
        if not kept:
            return
        divided, kept_rows, kept_places = zip(*kept)
        prompts, *answers = map(list, zip(*divided))
        self.chat = self.chat or any(map(partial(is_chat, self.renderer), prompts, answers[0]))
        encoded = [encode_answers(self.renderer, prompts, side, list(kept_places)) for side in answers]
        for row, where, *sides in zip(kept_rows, kept_places, *encoded):
            chosen, rejected = (self.side(side, where) for side in sides)
            if chosen is None or rejected is None:
                self.overlong += 1
                self.first_overlong = self.first_overlong or where
            elif not (any(chosen.mask) and any(rejected.mask)):
                self.leave_out(NO_ROOM, where)
            elif chosen == rejected:
                self.leave_out(EQUAL, where)
            else:
                margin = file.columns.keys[MARGIN]
                better_by = 0.0 if margin is None else number(row, margin, where)
                name = data_source(row, file.columns.keys[SOURCE], where, Path(file.name).stem)
                yield Pair(chosen, rejected, name, better_by)

    def _divided(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[tuple[Divided, Row, str]]:
        """Yield what can be tokenised of each row, with the row and its place."""
        keys = file.columns.keys
        for row, where in zip(rows, places):
            key = keys[PROMPT]
            prompt = None if key is None else as_prompt(column(row, key), where, file.padded)
            chosen, rejected = (
                as_side(column(row, str(keys[side])), f"{where}, column {keys[side]!r}", file.padded)
                for side in (CHOSEN, REJECTED)
            )
            divided = divide(prompt, chosen, rejected, where)
            if isinstance(divided, str):
                self.leave_out(divided, where)
            else:
                yield divided, row, where

    def leave_out(self, reason: str, where: str) -> None:
        """Count the row at ``where``, from which nothing can be learned, or refuse it."""
        if self.settings.unusable == "error":
            raise DataError(
                f"{where}: a {self.what} {reason}, from which nothing can be learned; remove the row, or set "
                "data.unusable=filter, which counts such rows and leaves them out"
            )
        self.left_out.add(reason, where)

    def side(self, encoded: Encoded, where: str) -> Side | None:
        """Return one side up to its last learned token, within the maximum length; None if it is to be left out."""
        ids, mask = encoded
        check_tokens(ids, self.vocabulary, self.renderer.tokenizer, where)
        end = max((place + 1 for place, learned in enumerate(mask) if learned), default=len(ids))
        if end > self.settings.max_length and self.settings.overlong != "truncate":
            if self.settings.overlong == "filter":
                return None
            raise DataError(
                f"{where}: a side has {end} tokens, more than data.max_length={self.settings.max_length}; raise it, or "
                "set data.overlong to filter or truncate"
            )
        end = min(end, self.settings.max_length)
        return Side(array("i", ids[:end]), bytes(map(int, mask[:end])))


def as_side(value: Any, where: str, padded: bool) -> Prompt:
    """``value`` checked to be text or messages, of which a single one needs no list; "" for null and for an empty list.

    Raises:
        DataError: it is something else; ``where`` names row and column.
    """
    if value is None or value == []:
        return ""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, str | list):
        raise DataError(f"{where} must hold text or a list of messages, not {value!r:.100}")
    return as_text(value, where) if isinstance(value, str) else as_prompt(value, where, padded)


def divide(prompt: Prompt | None, chosen: Prompt, rejected: Prompt, where: str) -> Divided | str:
    """Return the prompt and what either side adds to it, or the reason why they make no pair.

    Sides that are whole conversations begin with the prompt: it is what both have in common. So it is with texts if
    there is no ``prompt``.

    Raises:
        DataError: one side is text and the other messages.
    """
    if "" in (chosen, rejected):
        return EMPTY
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{where}: one side is text and the other a list of messages; write both in the same form")
    if isinstance(chosen, str) or isinstance(rejected, str):
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        divided = _divided_texts(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    elif chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant" and prompt is not None:
        divided = prompt, chosen, rejected
    else:
        divided = _divided_conversations(prompt, chosen, rejected)
    if isinstance(divided, str):
        return divided
    _, first, second = divided
    if first == second:
        return EQUAL
    return EMPTY if is_empty(first) or is_empty(second) else divided


def _divided_texts(chosen: str, rejected: str) -> Divided | str:
    """Divide two texts before the last white space that they have in common, as answers begin with it."""
    if chosen == rejected:
        return EQUAL
    common = _UP_TO_SPACE.match(chosen[: _common(chosen, rejected)])
    if common is None:
        return PROMPTS_DIFFER
    given = common[1]
    return given, chosen[len(given) :], rejected[len(given) :]


def _divided_conversations(prompt: Prompt | None, chosen: list[Message], rejected: list[Message]) -> Divided | str:
    """Divide two conversations after the messages that they have in common, which include ``prompt``."""
    if chosen == rejected:
        return EQUAL
    common = chosen[: _common(chosen, rejected)]
    texts = [message["content"] for message in common]
    includes = common[: len(prompt)] == prompt if isinstance(prompt, list) else prompt is None or prompt in texts
    sides = chosen[len(common) :], rejected[len(common) :]
    if not common or not includes:
        return PROMPTS_DIFFER
    if not all(sides):
        return EMPTY
    return (common, *sides) if all(side[0]["role"] == "assistant" for side in sides) else PROMPTS_DIFFER


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the number of items that both begin with."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(one, other)))


def is_empty(side: Prompt) -> bool:
    """Return whether there is no text in ``side``, or in what the assistant says there."""
    if isinstance(side, str):
        return not side.strip()
    return not any(message["content"].strip() for message in side if message["role"] == "assistant")
