"""Supervised samples: tokens, and which of them are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt, as_text
from rlcore_recipes.data.columns import Columns, Row, column, data_source
from rlcore_recipes.data.end_tokens import check_tokens, written_ends
from rlcore_recipes.data.files import fingerprint, pads_with_nulls, read_files
from rlcore_recipes.data.settings import SFTDataSettings

Segment = tuple[str, bool]  # text, and whether it is learned
_Prompt = str | list[Message]
_Encoded = tuple[list[int], list[float]]  # tokens and loss mask


@dataclass(frozen=True)
class SFTDataset:
    """Samples of one or several files, in order.

    Attributes:
        batch: ``tokens`` (jagged int64), ``loss_mask`` (jagged float32, 1 on the assistant's tokens and the end token
            after them), ``data_source``.
        file_sizes: samples per file, without the filtered ones.
        filtered: over-long samples left out.
        fingerprints: of what each file holds, in the columns that are read.
        ends: tokens that end an answer (see `written_ends`).
    """

    batch: Batch
    file_sizes: list[int]
    filtered: int = 0
    fingerprints: Sequence[str] = ()
    ends: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.batch)


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
            assistant turn, or a chat template that rewrites earlier turns.
    """
    renderer = Renderer(settings, tokenizer)
    samples: list[_Sample] = []
    sizes: list[int] = []
    prints: list[str] = []
    rows_read = 0
    chat = False
    for file, rows in read_files(files, Columns(_keys(settings), others=False), limit):
        rows_read += len(rows)
        chat = chat or any(_is_chat(settings, renderer, row) for row in rows)
        new = _file_samples(settings, renderer, rows, file, vocabulary)
        sizes.append(len(new))
        prints.append(fingerprint(rows, file))
        samples += new
    batch = Batch(
        {
            "tokens": Jagged.from_list([sample.tokens for sample in samples], dtype=torch.int64),
            "loss_mask": Jagged.from_list([sample.mask for sample in samples], dtype=torch.float32),
            "data_source": [sample.source for sample in samples],
        }
    )
    ends = written_ends(renderer, chat)
    return SFTDataset(batch, sizes, filtered=rows_read - len(samples), fingerprints=prints, ends=ends)


@dataclass(frozen=True)
class _Sample:
    tokens: list[int]
    mask: list[float]
    source: str


def _keys(settings: SFTDataSettings) -> dict[str, str | None]:
    """Column by the setting that names it."""
    source = {"data.data_source_key": settings.data_source_key}
    if settings.messages_key is not None:
        return {"data.messages_key": settings.messages_key, **source}
    return {"data.prompt_key": settings.prompt_key, "data.response_key": settings.response_key, **source}


def _is_chat(settings: SFTDataSettings, renderer: Renderer, row: Row) -> bool:
    return settings.messages_key is not None or renderer.is_chat(column(row, settings.prompt_key))


def _file_samples(
    settings: SFTDataSettings, renderer: Renderer, rows: list[Row], file: str, vocabulary: int | None
) -> list[_Sample]:
    """Return the samples of a file, without those that are too long."""
    places = [f"{file}, row {number}" for number in range(len(rows))]
    key, padded = settings.messages_key or settings.prompt_key, pads_with_nulls(file)
    prompts = [as_prompt(column(row, key), where, padded) for row, where in zip(rows, places)]
    if settings.messages_key is None:
        encoded = _encode_answers(renderer, prompts, [column(row, settings.response_key) for row in rows], places)
    else:
        encoded = _encode_conversations(renderer, prompts, places, settings.messages_key)
    samples = []
    for row, where, (ids, mask) in zip(rows, places, encoded):
        check_tokens(ids, vocabulary, renderer.tokenizer, where)
        if len(ids) > settings.max_length:
            if settings.overlong == "error":
                raise DataError(
                    f"{where}: the sample has {len(ids)} tokens, more than data.max_length={settings.max_length}; "
                    "raise it, or set data.overlong to filter or truncate"
                )
            ids, mask = ids[: settings.max_length], mask[: settings.max_length]
            if settings.overlong == "filter" or not any(mask):
                continue
        samples.append(_Sample(ids, mask, data_source(row, settings.data_source_key, where, Path(file).stem)))
    if not samples:
        raise DataError(
            f"none of the {len(rows)} samples of {file} fits data.max_length={settings.max_length}; raise it"
        )
    return samples


def _encode_conversations(renderer: Renderer, prompts: list[_Prompt], places: list[str], key: str) -> list[_Encoded]:
    """Return tokens and loss mask of the conversations in column ``key``, of which every assistant turn is learned."""
    ends = _end_texts(renderer, chat=True)
    conversations = []
    for messages, where in zip(prompts, places):
        if isinstance(messages, str):
            raise DataError(f"{where}: column {key!r} holds text, not messages")
        complete = [
            {**message, "content": _without_end(message["content"], ends)}
            if message["role"] == "assistant"
            else message
            for message in renderer.messages(messages)
        ]
        conversations.append(_turns(renderer, complete, where))
    return _encode_segments(renderer, conversations, places, chat=True)


def _encode_answers(
    renderer: Renderer, prompts: list[_Prompt], responses: list[Any], places: list[str]
) -> list[_Encoded]:
    """Return tokens and loss mask of prompts with responses, which are learned."""
    answers = []
    chat = any(map(renderer.is_chat, prompts))
    chat_ends, plain_ends = _end_texts(renderer, chat), _end_texts(renderer, chat=False)
    for prompt, response, where in zip(prompts, responses, places):
        if not as_text(response, f"{where}: the response"):
            raise DataError(f"{where}: the response is empty")
        if renderer.is_chat(prompt):
            answer = {"role": "assistant", "content": _without_end(response, chat_ends)}
            answers.append([(_turn(renderer, [*renderer.messages(prompt), answer], where)[1], True)])
        else:
            answers.append([(_without_end(response, plain_ends) + (renderer.tokenizer.eos_token or ""), True)])
    encoded = zip(renderer.prompt_tokens(prompts, places), _encode_segments(renderer, answers, places, chat))
    return [(prompt + ids, [0.0] * len(prompt) + mask) for prompt, (ids, mask) in encoded]


def _end_texts(renderer: Renderer, chat: bool) -> tuple[str, ...]:
    texts = renderer.tokenizer.convert_ids_to_tokens(sorted(written_ends(renderer, chat)))
    return tuple(text for text in texts if text)


def _without_end(answer: str, ends: tuple[str, ...]) -> str:
    """``answer`` without end tokens after it: one is put there, by the template or here."""
    while (bare := answer.rstrip()).endswith(ends):
        answer = bare[: -len(next(end for end in ends if bare.endswith(end)))]
    return answer


def _turns(renderer: Renderer, messages: list[Message], where: str) -> list[Segment]:
    """Return the conversation's text, divided into what comes from outside and what the assistant says."""
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{where}: the conversation begins with an assistant turn; put a message of the system or the user before "
            "it"
        )
    segments: list[Segment] = []
    said = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
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
