"""What the protocols have in common: a request for replies, and the replies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlcore.engines.rollout import Completion
from rlcore_agents.conversation import Reply
from rlcore_agents.endpoint import Refusal

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True)
class Exchange:
    """A request.

    Attributes:
        messages: in the format of OpenAI's chat completions, with texts as content.
        tools: schemas in the same format.
        max_tokens: of one reply; None: as many as the run allows.
        stop: strings that end a reply.
        n: number of replies.
        unsupported: what the request asks for that cannot be done, and is ignored.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    unsupported: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """One reply.

    Attributes:
        message: the reply as the client is given it: as `Reply.message`, without the stop string.
        prompt_tokens: length of the prompt.
        stop: the stop string that ended the reply; None if none did.
    """

    reply: Reply
    completion: Completion
    message: Mapping[str, Any]
    prompt_tokens: int
    stop: str | None

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        """Entries of ``tool_calls``."""
        calls: Sequence[Mapping[str, Any]] = self.message.get("tool_calls", ())
        return calls

    @property
    def cut_off(self) -> bool:
        """Whether a limit ended the reply."""
        return self.completion.finish_reason != "stop"


def text_of(content: Any, place: str) -> str:
    """Return the text of a message's content, which is a text or a list of parts.

    Raises:
        Refusal: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part["type"]
        if kind not in TEXT_PARTS:
            raise Refusal(400, f"{place}: content of type {kind!r} is not supported; the policy reads text", place)
        texts.append(part[TEXT_PARTS[kind]])
    return "".join(texts)


def function_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of a tool in the format of OpenAI's chat completions."""
    described = {"description": description} if description else {}
    return {
        "type": "function",
        "function": {"name": name, **described, "parameters": parameters or {"type": "object", "properties": {}}},
    }


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Refuse a request whose parts do not have the form that the endpoint ``path`` documents."""
    try:
        yield
    except KeyError as error:
        raise Refusal(400, f"a part of the request to {path} has no field {error}") from error
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise Refusal(400, f"the request is not in the format of {path}: {error}") from error
