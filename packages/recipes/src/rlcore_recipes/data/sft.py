"""Supervised samples: tokens, and which of them are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt
from rlcore_recipes.data.files import Row, column, read_files, require_columns
from rlcore_recipes.data.settings import SFTDataSettings

Segment = tuple[str, bool]  # text, and whether it is learned


@dataclass(frozen=True)
class SFTDataset:
    """Samples of one or several files, in order.

    Attributes:
        batch: ``tokens`` (jagged int64), ``loss_mask`` (jagged float32, 1 on the assistant's tokens and the end token
            after them), ``data_source``.
        file_sizes: samples per file, without the filtered ones.
        filtered: over-long samples left out.
    """

    batch: Batch
    file_sizes: list[int]
    filtered: int = 0

    def __len__(self) -> int:
        return len(self.batch)


def load_sft(settings: SFTDataSettings, files: Sequence[str], tokenizer: Any, limit: int | None = None) -> SFTDataset:
    """Read and tokenise supervised samples.

    Prompts and answers are tokenised separately, so that a prompt's tokens are those that generation starts from.

    Args:
        files: ``settings.train_files`` or ``settings.val_files``.
        limit: read only the first rows of all files together (``settings.val_limit``).

    Raises:
        DataError: as `rlcore_recipes.data.prompts.load_prompts`; also a null response, a conversation without an
            assistant turn, or a chat template that rewrites earlier turns.
    """
    renderer = Renderer(settings, tokenizer)
    tokens: list[list[int]] = []
    masks: list[list[float]] = []
    sources: list[str] = []
    sizes: list[int] = []
    rows_read = 0
    for file, rows in read_files(files, limit):
        rows_read += len(rows)
        before = len(tokens)
        for number, (ids, mask) in enumerate(_encode(settings, renderer, rows, file)):
            if len(ids) > settings.max_length:
                if settings.overlong == "error":
                    raise DataError(
                        f"{file}, row {number}: the sample has {len(ids)} tokens, more than data.max_length="
                        f"{settings.max_length}; raise it, or set data.overlong to filter or truncate"
                    )
                ids, mask = ids[: settings.max_length], mask[: settings.max_length]
                if settings.overlong == "filter" or not any(mask):
                    continue
            tokens.append(ids)
            masks.append(mask)
            key = settings.data_source_key
            sources.append(str(column(rows[number], key)) if key else Path(file).stem)
        sizes.append(len(tokens) - before)
        if not sizes[-1]:
            raise DataError(
                f"none of the {len(rows)} samples of {file} fits data.max_length={settings.max_length}; raise it"
            )
    batch = Batch(
        {
            "tokens": Jagged.from_list(tokens, dtype=torch.int64),
            "loss_mask": Jagged.from_list(masks, dtype=torch.float32),
            "data_source": sources,
        }
    )
    return SFTDataset(batch, sizes, filtered=rows_read - len(tokens))


def _encode(
    settings: SFTDataSettings, renderer: Renderer, rows: list[Row], file: str
) -> list[tuple[list[int], list[float]]]:
    """Tokens and loss mask of every row."""
    source = {"data.data_source_key": settings.data_source_key}
    if settings.messages_key is not None:
        require_columns(rows, {"data.messages_key": settings.messages_key, **source}, file)
        conversations = []
        for number, row in enumerate(rows):
            messages = as_prompt(column(row, settings.messages_key), f"{file}, row {number}")
            if isinstance(messages, str):
                raise DataError(f"{file}, row {number}: column {settings.messages_key!r} holds text, not messages")
            conversations.append(_turns(renderer, renderer.messages(messages), f"{file}, row {number}"))
        return _encode_segments(renderer, conversations)

    columns = {"data.prompt_key": settings.prompt_key, "data.response_key": settings.response_key, **source}
    require_columns(rows, columns, file)
    prompts, answers = [], []
    for number, row in enumerate(rows):
        prompt = as_prompt(column(row, settings.prompt_key), f"{file}, row {number}")
        response = column(row, settings.response_key)
        if not isinstance(response, str) or not response:
            raise DataError(f"{file}, row {number}: the response must be text, not {response!r}")
        prompts.append(prompt)
        if renderer.is_chat(prompt):
            messages = [*renderer.messages(prompt), {"role": "assistant", "content": response}]
            answers.append([(_turn(renderer, messages, f"{file}, row {number}")[1], True)])
        else:
            answers.append([(response + (renderer.tokenizer.eos_token or ""), True)])
    encoded = zip(renderer.prompt_tokens(prompts), _encode_segments(renderer, answers))
    return [(prompt + ids, [0.0] * len(prompt) + mask) for prompt, (ids, mask) in encoded]


def _turns(renderer: Renderer, messages: list[Message], where: str) -> list[Segment]:
    """The conversation's text, divided into what comes from outside and what the assistant says."""
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
    """The text before the last message, generation prompt included, and that message's text."""
    before = renderer.chat_text(messages[:-1], add_generation_prompt=True)
    whole = renderer.chat_text(messages, add_generation_prompt=False)
    if not whole.startswith(before):
        raise DataError(
            f"{where}: under the chat template the assistant's turn does not begin with the generation prompt; set "
            "data.chat_template_kwargs so that both agree"
        )
    return before, whole[len(before) :]


def _encode_segments(renderer: Renderer, samples: list[list[Segment]]) -> list[tuple[list[int], list[float]]]:
    """Tokens of each sample's segments one after another, and 1 where they are learned.

    What a template writes after the end token of a turn (a line break, say) is never generated and not learned.
    """
    ids = iter(renderer.encode([text for segments in samples for text, _ in segments]))
    end = renderer.tokenizer.eos_token_id
    encoded = []
    for segments in samples:
        tokens: list[int] = []
        mask: list[float] = []
        for _, learned in segments:
            new = next(ids)
            reach = 0 if not learned else len(new) - new[::-1].index(end) if end in new else len(new)
            tokens += new
            mask += [1.0] * reach + [0.0] * (len(new) - reach)
        encoded.append((tokens, mask))
    return encoded
