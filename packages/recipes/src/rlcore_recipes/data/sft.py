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
from rlcore_recipes.data.chat import Message, Renderer, as_prompt, as_text
from rlcore_recipes.data.columns import Row, column, data_source
from rlcore_recipes.data.end_tokens import check_tokens, written_ends
from rlcore_recipes.data.files import DataFile, Fingerprint, open_files
from rlcore_recipes.data.layouts import MESSAGES, PROMPT, RESPONSE, SOURCE, TEXT, sft_columns
from rlcore_recipes.data.sample_store import SampleStore
from rlcore_recipes.data.settings import SFTDataSettings

Segment = tuple[str, bool]  # text, and whether it is learned
_Prompt = str | list[Message]
_Encoded = tuple[list[int], list[float]]  # tokens and loss mask


@dataclass(frozen=True)
class _Sample:
    tokens: array[int]
    mask: bytes  # 1 on learned tokens
    source: str


@dataclass(frozen=True)
class SFTDataset:
    """Samples of one or several files, in order.

    Attributes:
        samples: their tokens, loss mask and data source.
        file_sizes: samples per file, without the filtered ones.
        filtered: over-long samples left out.
        fingerprints: of what each file holds, in the columns that are read.
        ends: tokens that end an answer (see `written_ends`).
        notes: what was recognised in the files.
    """

    samples: Sequence[_Sample]
    file_sizes: list[int]
    filtered: int = 0
    fingerprints: Sequence[str] = ()
    ends: frozenset[int] = frozenset()
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, indices: Iterable[int]) -> Batch:
        """Return samples as a batch.

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

    Prompts and answers are tokenised separately, so that a prompt's tokens are those that generation starts from.

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        limit: read only the first rows of all files together (``settings.val_limit``).
        vocabulary: tokens that the model knows; None does not check that it knows those of the samples.

    Raises:
        DataError: as `rlcore_recipes.data.prompts.load_prompts`; also a null response, a conversation without an
            assistant turn, a chat template that rewrites earlier turns, or several columns to learn from.
    """
    reader = _Reader(settings, Renderer(settings, tokenizer), vocabulary)
    samples: SampleStore[_Sample] = SampleStore()
    sizes: list[int] = []
    prints: list[str] = []
    notes: list[str] = []
    for file in open_files(files, sft_columns(settings), limit):
        before = len(samples)
        prints.append(reader.read(file, samples))
        sizes.append(len(samples) - before)
        notes += [f"{file.name}: {note}" for note in file.columns.notes]
    ends = written_ends(reader.renderer, reader.chat)
    return SFTDataset(samples, sizes, filtered=reader.filtered, fingerprints=prints, ends=ends, notes=notes)


@dataclass
class _Reader:
    """Makes samples of files.

    Attributes:
        chat: whether the chat template was used.
        filtered: samples left out so far, because they are too long.
    """

    settings: SFTDataSettings
    renderer: Renderer
    vocabulary: int | None
    chat: bool = False
    filtered: int = 0

    def read(self, file: DataFile, samples: SampleStore[_Sample]) -> str:
        """Append those of ``file`` that are not too long to ``samples``; return the file's fingerprint."""
        fingerprint = Fingerprint(file.name)
        rows_read, before = 0, len(samples)
        for rows in file.chunks:
            fingerprint.add(rows)
            places = [f"{file.name}, row {number}" for number in range(rows_read, rows_read + len(rows))]
            samples.extend(self._samples(file, rows, places))
            rows_read += len(rows)
        used = len(samples) - before
        if not used:
            raise DataError(
                f"none of the {rows_read} samples of {file.name} fits data.max_length={self.settings.max_length}; "
                "raise it"
            )
        self.filtered += rows_read - used
        return fingerprint.hex()

    def _samples(self, file: DataFile, rows: list[Row], places: list[str]) -> Iterator[_Sample]:
        """Yield the samples of rows, without those that are too long."""
        settings, source = self.settings, file.columns.keys[SOURCE]
        for row, where, (ids, mask) in zip(rows, places, self._encoded(file, rows, places)):
            check_tokens(ids, self.vocabulary, self.renderer.tokenizer, where)
            if len(ids) > settings.max_length:
                if settings.overlong == "error":
                    raise DataError(
                        f"{where}: the sample has {len(ids)} tokens, more than data.max_length={settings.max_length}; "
                        "raise it, or set data.overlong to filter or truncate"
                    )
                ids, mask = ids[: settings.max_length], mask[: settings.max_length]
                if settings.overlong == "filter" or not any(mask):
                    continue
            name = data_source(row, source, where, Path(file.name).stem)
            yield _Sample(array("i", ids), bytes(map(int, mask)), name)

    def _encoded(self, file: DataFile, rows: list[Row], places: list[str]) -> list[_Encoded]:
        """Return tokens and loss mask of rows, in the form that the file's columns have."""
        keys = file.columns.keys
        if (key := keys.get(TEXT)) is not None:
            return _encode_texts(self.renderer, [column(row, key) for row in rows], places)
        key = keys.get(MESSAGES) or keys[PROMPT]
        assert key is not None
        prompts = [as_prompt(column(row, key), where, file.padded) for row, where in zip(rows, places)]
        if key == keys.get(MESSAGES):
            self.chat = True
            return _encode_conversations(self.renderer, prompts, places, key)
        response = keys[RESPONSE]
        assert response is not None
        answers = [_answer(column(row, response), where, file.padded) for row, where in zip(rows, places)]
        self.chat = self.chat or any(map(partial(_is_chat, self.renderer), prompts, answers))
        return _encode_answers(self.renderer, prompts, answers, places)


def _answer(value: Any, where: str, padded: bool) -> _Prompt:
    """``value`` checked to be a response: text, or messages that follow the prompt."""
    if isinstance(value, list):
        return as_prompt(value, f"{where}, in the response", padded)
    if not as_text(value, f"{where}: the response"):
        raise DataError(f"{where}: the response is empty")
    return value  # type: ignore[no-any-return]


def _is_chat(renderer: Renderer, prompt: _Prompt, answer: _Prompt) -> bool:
    return renderer.is_chat(prompt) or not isinstance(answer, str)


def _encode_texts(renderer: Renderer, texts: list[Any], places: list[str]) -> list[_Encoded]:
    """Return tokens and loss mask of texts, which are learned, and the end token after them."""
    ends = _end_texts(renderer, chat=False)
    rows = []
    for text, where in zip(texts, places):
        if not as_text(text, f"{where}: the text").strip():
            raise DataError(f"{where}: the text is empty")
        rows.append((_without_end(text, ends) + (renderer.tokenizer.eos_token or ""), where))
    # nothing precedes the first token, from which it could be learned
    return [(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids in renderer.encode_plain(rows)]


def _encode_conversations(
    renderer: Renderer, conversations: Sequence[_Prompt], places: list[str], key: str
) -> list[_Encoded]:
    """Return tokens and loss mask of the conversations in column ``key``, of which every assistant turn is learned."""
    ends = _end_texts(renderer, chat=True)
    segments = []
    for messages, where in zip(conversations, places):
        if isinstance(messages, str):
            raise DataError(f"{where}: column {key!r} holds text, not messages")
        segments.append(_turns(renderer, _with_bare_answers(renderer.messages(messages), ends), where))
    return _encode_segments(renderer, segments, places, chat=True)


def _with_bare_answers(messages: list[Message], ends: tuple[str, ...]) -> list[Message]:
    return [
        {**message, "content": _without_end(message["content"], ends)} if message["role"] == "assistant" else message
        for message in messages
    ]


def _encode_answers(
    renderer: Renderer, prompts: list[_Prompt], answers: list[_Prompt], places: list[str]
) -> list[_Encoded]:
    """Return tokens and loss mask of prompts with answers, which are learned: of messages the assistant's turns."""
    chat = any(map(partial(_is_chat, renderer), prompts, answers))
    chat_ends, plain_ends = _end_texts(renderer, chat), _end_texts(renderer, chat=False)
    segments: list[list[Segment]] = []
    plain = iter(_plain_prompts(renderer, prompts, answers, places))
    for prompt, answer, where in zip(prompts, answers, places):
        if _is_chat(renderer, prompt, answer):
            given = renderer.messages(prompt)
            said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            segments.append(_turns(renderer, [*given, *_with_bare_answers(said, chat_ends)], where, len(given)))
        else:
            assert isinstance(answer, str)
            segments.append([(_without_end(answer, plain_ends) + (renderer.tokenizer.eos_token or ""), True)])
    encoded = []
    for prompt, answer, (ids, mask) in zip(prompts, answers, _encode_segments(renderer, segments, places, chat)):
        before = [] if _is_chat(renderer, prompt, answer) else next(plain)
        encoded.append((before + ids, [0.0] * len(before) + mask))
    return encoded


def _plain_prompts(
    renderer: Renderer, prompts: list[_Prompt], answers: list[_Prompt], places: list[str]
) -> list[list[int]]:
    """Return the token ids of those prompts that do not go through the chat template."""
    rows = zip(prompts, answers, places)
    chosen = [(prompt, where) for prompt, answer, where in rows if not _is_chat(renderer, prompt, answer)]
    return renderer.prompt_tokens([prompt for prompt, _ in chosen], [where for _, where in chosen])


def _end_texts(renderer: Renderer, chat: bool) -> tuple[str, ...]:
    texts = renderer.tokenizer.convert_ids_to_tokens(sorted(written_ends(renderer, chat)))
    return tuple(text for text in texts if text)


def _without_end(answer: str, ends: tuple[str, ...]) -> str:
    """``answer`` without end tokens after it: one is put there, by the template or here."""
    while (bare := answer.rstrip()).endswith(ends):
        answer = bare[: -len(next(end for end in ends if bare.endswith(end)))]
    return answer


def _turns(renderer: Renderer, messages: list[Message], where: str, given: int = 0) -> list[Segment]:
    """Return the conversation's text, divided into what comes from outside and what the assistant says.

    Args:
        given: messages at the beginning that come from outside, whatever their roles.
    """
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{where}: the conversation begins with an assistant turn; put a message of the system or the user before "
            "it"
        )
    segments: list[Segment] = []
    said = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < given:
            continue
        before, answer = _turn(renderer, messages[: index + 1], where)
        if not before.startswith(said):
            raise DataError(
                f"{where}: the chat template writes earlier turns differently once later ones follow, so this cannot "
                "be learned as one sample; make one row per assistant turn, with prompt and response"
            )
        segments += [(before[len(said) :], False), (answer, True)]
        said = before + answer
    if not segments:
        raise DataError(f"{where}: the conversation has no assistant turn")
    return segments


def _turn(renderer: Renderer, messages: list[Message], where: str) -> tuple[str, str]:
    """Return the text before the last message, generation prompt included, and that message's text."""
    before = renderer.chat_text(messages[:-1], where, add_generation_prompt=True)  # shift allowed: messages
    conversation = renderer.chat_text(messages, where, add_generation_prompt=False)
    if not conversation.startswith(before):
        raise DataError(
            f"{where}: under the chat template the assistant's turn does not begin with the generation prompt; set "
            "data.chat_template_kwargs so that both agree"
        )
    return before, conversation[len(before) :]


def _encode_segments(renderer: Renderer, samples: list[list[Segment]], places: list[str], chat: bool) -> list[_Encoded]:
    """Return tokens of each sample's segments one after another, and 1 where they are learned.

    What a template writes after the end token of a turn (a line break, say) is never generated and not learned.
    """
    texts = [(text, where) for segments, where in zip(samples, places) for text, _ in segments]
    ids = iter(renderer.encode([text for text, _ in texts], [where for _, where in texts]))
    ends = written_ends(renderer, chat)
    encoded = []
    for segments in samples:
        tokens: list[int] = []
        mask: list[float] = []
        for _, learned in segments:
            new = next(ids)
            last_end = max((place for place, token in enumerate(new) if token in ends), default=len(new) - 1)
            reach = last_end + 1 if learned else 0
            tokens += new
            mask += [1.0] * reach + [0.0] * (len(new) - reach)
        encoded.append((tokens, mask))
    return encoded
