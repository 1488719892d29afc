"""Tokens of texts, conversations, and prompts with answers, and which of them are learned.

Prompts and answers are tokenised separately, so that a prompt's tokens are those that generation starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt, as_text
from rlcore_recipes.data.end_tokens import written_ends

Segment = tuple[str, bool]
"""Text, and whether it is learned."""
Prompt = str | list[Message]
Encoded = tuple[list[int], list[float]]
"""Tokens, and 1 where they are learned."""


def as_answer(value: Any, where: str, padded: bool) -> Prompt:
    """``value`` checked to be a response: text, or messages that follow the prompt."""
    if isinstance(value, list):
        return as_prompt(value, f"{where}, in the response", padded)
    if not as_text(value, f"{where}: the response"):
        raise DataError(f"{where}: the response is empty")
    return value  # type: ignore[no-any-return]


def is_chat(renderer: Renderer, prompt: Prompt, answer: Prompt) -> bool:
    """Return whether the chat template writes ``prompt`` and ``answer``."""
    return renderer.is_chat(prompt) or not isinstance(answer, str)


def encode_texts(renderer: Renderer, texts: list[Any], places: list[str]) -> list[Encoded]:
    """Return tokens and loss mask of texts, which are learned, and the end token after them."""
    ends = _end_texts(renderer, chat=False)
    rows = []
    for text, where in zip(texts, places):
        if not as_text(text, f"{where}: the text").strip():
            raise DataError(f"{where}: the text is empty")
        rows.append((_without_end(text, ends) + (renderer.tokenizer.eos_token or ""), where))
    # nothing precedes the first token, from which it could be learned
    return [(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids in renderer.encode_plain(rows)]


def encode_conversations(
    renderer: Renderer, conversations: Sequence[Prompt], places: list[str], key: str
) -> list[Encoded]:
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


def encode_answers(
    renderer: Renderer, prompts: list[Prompt], answers: list[Prompt], places: list[str]
) -> list[Encoded]:
    """Return tokens and loss mask of prompts with answers, which are learned: of messages the assistant's turns."""
    chat = any(map(partial(is_chat, renderer), prompts, answers))
    chat_ends, plain_ends = _end_texts(renderer, chat), _end_texts(renderer, chat=False)
    segments: list[list[Segment]] = []
    plain = iter(_plain_prompts(renderer, prompts, answers, places))
    for prompt, answer, where in zip(prompts, answers, places):
        if is_chat(renderer, prompt, answer):
            given = renderer.messages(prompt)
            said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            segments.append(_turns(renderer, [*given, *_with_bare_answers(said, chat_ends)], where, len(given)))
        else:
            assert isinstance(answer, str)
            segments.append([(_without_end(answer, plain_ends) + (renderer.tokenizer.eos_token or ""), True)])
    encoded = []
    for prompt, answer, (ids, mask) in zip(prompts, answers, _encode_segments(renderer, segments, places, chat)):
        before = [] if is_chat(renderer, prompt, answer) else next(plain)
        encoded.append((before + ids, [0.0] * len(before) + mask))
    return encoded


def _plain_prompts(
    renderer: Renderer, prompts: list[Prompt], answers: list[Prompt], places: list[str]
) -> list[list[int]]:
    """Return the token ids of those prompts that do not go through the chat template."""
    rows = zip(prompts, answers, places)
    chosen = [(prompt, where) for prompt, answer, where in rows if not is_chat(renderer, prompt, answer)]
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
    before = renderer.chat_text(messages[:-1], where, add_generation_prompt=True)
    conversation = renderer.chat_text(messages, where, add_generation_prompt=False)
    if not conversation.startswith(before):
        raise DataError(
            f"{where}: under the chat template the assistant's turn does not begin with the generation prompt; set "
            "data.chat_template_kwargs so that both agree"
        )
    return before, conversation[len(before) :]


def _encode_segments(renderer: Renderer, samples: list[list[Segment]], places: list[str], chat: bool) -> list[Encoded]:
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
