"""Tokens of texts, conversations, and prompts with answers, and which of them are learned.

Prompts and answers are tokenised separately, so that a prompt's tokens are those that generation starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Literal

from rlcore.errors import DataError
from rlcore_recipes.data.chat import Message, Renderer, as_prompt, as_text
from rlcore_recipes.data.end_tokens import end_of_turn, special_tokens, written_ends

Segment = tuple[str, bool]
"""Text, and whether it is learned."""
Prompt = str | list[Message]
Encoded = tuple[list[int], list[float]]
"""Tokens, and 1 where they are learned."""
Learn = Literal["answers", "last_answer", "everything"]
"""What is learned: every assistant turn (or the response), the last turn alone, or the prompts too."""
Variables = Mapping[str, Any]
"""Of one row, for the chat template: its tools, say."""


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
    renderer: Renderer,
    conversations: Sequence[Prompt],
    places: list[str],
    key: str,
    learn: Learn = "answers",
    variables: Sequence[Variables] | None = None,
) -> list[Encoded]:
    """Return tokens and loss mask of the conversations in column ``key``, of which assistant turns are learned.

    Args:
        variables: of each row, for the chat template.
    """
    ends = _end_texts(renderer, chat=True)
    segments = []
    for messages, where, given in zip(conversations, places, variables or repeat({})):
        if isinstance(messages, str):
            raise DataError(f"{where}: column {key!r} holds text, not messages")
        turns = _with_bare_answers(renderer.messages(messages), ends)
        segments.append(_turns(_Template(renderer, where, given), turns, learn=learn))
    return [_learned(encoded, learn) for encoded in _encode_segments(renderer, segments, places, chat=True)]


def _with_bare_answers(messages: list[Message], ends: tuple[str, ...]) -> list[Message]:
    return [
        {**message, "content": _without_end(message["content"], ends)} if message["role"] == "assistant" else message
        for message in messages
    ]


def encode_answers(
    renderer: Renderer,
    prompts: list[Prompt],
    answers: list[Prompt],
    places: list[str],
    learn: Learn = "answers",
    variables: Sequence[Variables] | None = None,
) -> list[Encoded]:
    """Return tokens and loss mask of prompts with answers, which are learned: of messages the assistant's turns.

    Args:
        variables: of each row, for the chat template.
    """
    chat = any(map(partial(is_chat, renderer), prompts, answers))
    chat_ends, plain_ends = _end_texts(renderer, chat), _end_texts(renderer, chat=False)
    segments: list[list[Segment]] = []
    plain = iter(_plain_prompts(renderer, prompts, answers, places))
    for prompt, answer, where, given in zip(prompts, answers, places, variables or repeat({})):
        if is_chat(renderer, prompt, answer):
            before = renderer.messages(prompt)
            said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            turns = [*before, *_with_bare_answers(said, chat_ends)]
            segments.append(_turns(_Template(renderer, where, given), turns, len(before), learn))
        else:
            assert isinstance(answer, str)
            if given:
                raise DataError(f"{where}: {' and '.join(given)} are for a chat template, and this row is plain text")
            segments.append([(_without_end(answer, plain_ends) + (renderer.tokenizer.eos_token or ""), True)])
    encoded = []
    for prompt, answer, (ids, mask) in zip(prompts, answers, _encode_segments(renderer, segments, places, chat)):
        given_ids = [] if is_chat(renderer, prompt, answer) else next(plain)
        encoded.append(_learned((given_ids + ids, [0.0] * len(given_ids) + mask), learn))
    return encoded


def _learned(encoded: Encoded, learn: Learn) -> Encoded:
    """Return ``encoded`` with the prompts learned too, if ``learn`` says so; what follows the last end is not."""
    ids, mask = encoded
    if learn != "everything" or not any(mask):
        return encoded
    reach = max(place for place, learned in enumerate(mask) if learned) + 1
    # nothing precedes the first token, from which it could be learned
    return ids, [0.0] + [1.0] * (reach - 1) + [0.0] * (len(ids) - reach)


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


@dataclass(frozen=True)
class _Template:
    """The chat template with the variables of one row.

    Attributes:
        where: file and row.
    """

    renderer: Renderer
    where: str
    variables: Variables

    def text(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        """Return the conversation under the template."""
        return self.renderer.chat_text(
            messages, self.where, add_generation_prompt=add_generation_prompt, variables=self.variables
        )


def _turns(template: _Template, messages: list[Message], given: int = 0, learn: Learn = "answers") -> list[Segment]:
    """Return the conversation's text, divided into what comes from outside and what the assistant says.

    Args:
        given: messages at the beginning that come from outside, whatever their roles.
    """
    where = template.where
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{where}: the conversation begins with an assistant turn; put a message of the system or the user before "
            "it"
        )
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= given]
    if not answers:
        raise DataError(f"{where}: the conversation has no assistant turn")
    segments: list[Segment] = []
    said = ""
    for index in answers[-1:] if learn == "last_answer" else answers:
        before, answer = _turn(template, messages[: index + 1])
        if not before.startswith(said):
            raise DataError(
                f"{where}: the chat template writes earlier turns differently once later ones follow, so this cannot "
                "be learned as one sample; make one row per assistant turn, with prompt and response, or set "
                "data.learn=last_answer"
            )
        segments += [(before[len(said) :], False), (answer, True)]
        said = before + answer
    _check_tools(said, messages[: answers[-1] + 1], template)
    return segments


def _check_tools(text: str, messages: list[Message], template: _Template) -> None:
    """Make sure that the template wrote the tools of a row and the calls in its messages into ``text``.

    Raises:
        DataError: it left one out.
    """
    called = [call for message in messages for call in message.get("tool_calls") or []]
    for what, found in (("tool", template.variables.get("tools", ())), ("tool call", called)):
        for tool in found:
            function = tool.get("function", tool) if isinstance(tool, dict) else {}
            name = function.get("name")
            if not isinstance(name, str):
                raise DataError(f"{template.where}: a {what} needs a function with a name, not {tool!r:.100}")
            if name not in text:
                raise DataError(
                    f"{template.where}: the tokenizer's chat template does not write the {what} {name!r}; use a model "
                    "whose template knows tools, or write them as text into the messages"
                )


def _turn(template: _Template, messages: list[Message]) -> tuple[str, str]:
    """Return the text before the last message, generation prompt included, and that message's text."""
    where = template.where
    before = template.text(messages[:-1], add_generation_prompt=True)
    conversation = template.text(messages, add_generation_prompt=False)
    if not conversation.startswith(before):
        raise DataError(
            f"{where}: under the chat template the assistant's turn does not begin with the generation prompt; set "
            "data.chat_template_kwargs so that both agree"
        )
    return before, conversation[len(before) :]


def _encode_segments(renderer: Renderer, samples: list[list[Segment]], places: list[str], chat: bool) -> list[Encoded]:
    """Return tokens of each sample's segments one after another, and 1 where they are learned.

    What a template writes after the end token of a turn (a line break, say) is never generated and not learned. Where a
    template writes no end token, as GLM's, a turn ends with the special token with which the next message begins, and
    the last one with `end_of_turn` or, if there is none, with the tokenizer's end token.
    """
    texts = [(text, where) for segments, where in zip(samples, places) for text, _ in segments]
    ids = iter(renderer.encode([text for text, _ in texts], [where for _, where in texts]))
    ends, special = written_ends(renderer, chat), special_tokens(renderer.tokenizer)
    end = end_of_turn(renderer) if chat else None
    end = renderer.tokenizer.eos_token_id if end is None else end
    encoded = []
    for segments in samples:
        tokens: list[int] = []
        mask: list[float] = []
        open_turn = False
        for _, learned in segments:
            new = next(ids)
            last_end = max((place for place, token in enumerate(new) if token in ends), default=None)
            reach = (len(new) if last_end is None else last_end + 1) if learned else 0
            tokens += new
            mask += [1.0] * reach + [0.0] * (len(new) - reach)
            if open_turn and new and new[0] in special:
                mask[-len(new)] = 1.0
            open_turn = learned and last_end is None
        if open_turn and end is not None:
            tokens.append(end)
            mask.append(1.0)
        encoded.append((tokens, mask))
    return encoded
