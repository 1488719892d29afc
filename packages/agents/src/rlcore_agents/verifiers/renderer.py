"""How verifiers' train client turns messages into tokens: as the chat format of all environments does."""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar

from renderers.base import ParsedResponse, ParsedToolCall, RenderedTokens, ToolCallParseStatus
from renderers.configs import BaseRendererConfig, CustomRendererConfig

from rlcore.engines.episode import EpisodeSpec
from rlcore_agents.conversation import ChatFormat, chat_format
from rlcore_agents.conversation.chat_format import RecordedTurn
from rlcore_agents.conversation.handwritten import HandWrittenFormat
from rlcore_agents.conversation.reply import ParsedCall, ParsedReply, ToolCall

if TYPE_CHECKING:
    from renderers import RendererConfig

Message = Mapping[str, Any]
REMEMBERED = 4096
"""Prompts whose messages are kept until their conversations go on."""
_formats: dict[str, ChatFormat] = {}


def renderer_config(spec: EpisodeSpec) -> RendererConfig:
    """Return the configuration of the train client's renderer: the hand-written one, or one of the model's template.

    Raises:
        ConfigError: the setting ``renderer`` does not fit the model, or the model has no chat template.
    """
    chat = chat_format(spec)
    if isinstance(chat, HandWrittenFormat):
        config: RendererConfig = chat.renderer.config
        return config
    name = f"{spec.model.path} {len(_formats)}"
    name = next((known for known, other in _formats.items() if other is chat), name)
    _formats[name] = chat
    return CustomRendererConfig(import_path=f"{__name__}.TemplateRenderer", chat=name)


class TemplateRendererConfig(BaseRendererConfig):  # type: ignore[misc]
    """Names the chat format, which cannot be part of a configuration."""

    chat: str
    _internal_fields = frozenset({"chat"})


class TemplateRenderer:
    """A `ChatFormat` as a renderer of the package `renderers`, whose own for templates re-renders every turn.

    A bridge to the next turn needs the messages of the last one, which `renderers` does not pass: they are remembered
    by the tokens of the prompt.
    """

    config_class: ClassVar = TemplateRendererConfig
    is_prefix_stable = False
    supports_tools = True

    def __init__(self, tokenizer: Any, config: TemplateRendererConfig) -> None:
        self.config = config
        self._chat = _formats[config.chat]
        self._messages: OrderedDict[bytes, list[Message]] = OrderedDict()

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, add_generation_prompt: bool = False
    ) -> RenderedTokens:
        """Render a conversation; its tokens are not attributed to messages."""
        tokens = self.render_ids(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        return self._remembered(tokens, list(messages), messages)

    def render_ids(
        self, messages: Sequence[Message], *, tools: Any = None, add_generation_prompt: bool = False
    ) -> list[int]:
        """Return the tokens of a conversation up to where a reply begins."""
        assert add_generation_prompt, "the train client renders prompts"
        return self._chat.prompt(messages, tools or ())

    def parse_response(
        self, token_ids: Sequence[int], *, tools: Any = None, prompt_ids: Sequence[int] | None = None
    ) -> ParsedResponse:
        """Return what sampled tokens say."""
        reply = self._chat.parse(prompt_ids or (), token_ids, tools or ())
        return ParsedResponse(reply.content, reply.reasoning, [_call(call) for call in reply.calls])

    def get_stop_token_ids(self) -> list[int]:
        """Return the tokens that end a reply, besides the engine's own."""
        return list(self._chat.stop_tokens)

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: Sequence[int],
        previous_completion_ids: Sequence[int],
        new_messages: Sequence[Message],
        *,
        tools: Any = None,
    ) -> RenderedTokens | None:
        """Return the last turn's tokens and those of ``new_messages`` after it; None if they have to be rendered."""
        messages = self._messages.get(_digest(previous_prompt_ids))
        if messages is None:
            return None
        reply = _message(self._chat.parse(previous_prompt_ids, previous_completion_ids, tools or ()))
        turn = RecordedTurn(messages, tools or (), previous_prompt_ids, previous_completion_ids, reply)
        new = self._chat.continuation(turn, new_messages)
        if new is None:
            return None
        tokens = [*previous_prompt_ids, *previous_completion_ids, *new]
        return self._remembered(tokens, [*messages, reply, *new_messages], new_messages)

    def _remembered(self, tokens: list[int], messages: list[Message], rendered: Sequence[Message]) -> RenderedTokens:
        """Keep the messages of a prompt, and return its tokens without saying which message each is of."""
        self._messages[_digest(tokens)] = messages
        while len(self._messages) > REMEMBERED:
            self._messages.popitem(last=False)
        roles = [str(message.get("role") or "") for message in rendered]
        return RenderedTokens(token_ids=tokens, message_indices=[-1] * len(tokens), message_roles=roles)


def _digest(tokens: Sequence[int]) -> bytes:
    return blake2b(array("q", tokens).tobytes(), digest_size=16).digest()


def _message(reply: ParsedReply) -> Message:
    """Return a reply as the train client's answer has it."""
    calls = [
        ToolCall(call.id or f"call_{place}", call.name, call.arguments, raw=call.raw).as_message()
        for place, call in enumerate(reply.calls)
        if call.name
    ]
    return {
        "role": "assistant",
        "content": reply.content,
        **({} if reply.reasoning is None else {"reasoning_content": reply.reasoning}),
        **({"tool_calls": calls} if calls else {}),
    }


def _call(call: ParsedCall) -> ParsedToolCall:
    status = ToolCallParseStatus.INVALID_JSON if call.arguments is None else ToolCallParseStatus.OK
    return ParsedToolCall(call.raw, call.name or None, _text(call), status=status, id=call.id)


def _text(call: ParsedCall) -> str:
    """Return the arguments of a call; those of a malformed one are its text."""
    return call.raw if call.arguments is None else json.dumps(call.arguments, ensure_ascii=False)
