"""An episode whose requests are conversations, recorded as a tree of exact tokens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rlcore.engines.episode import EpisodeLimits
from rlcore.engines.rollout import Completion, SamplingParams
from rlcore.errors import DataError
from rlcore_agents.conversation import TokenTree, Turn
from rlcore_agents.endpoint import Refusal, Session
from rlcore_agents.gateway.exchange import Answer, Exchange
from rlcore_agents.gateway.settings import SAMPLING, Body

logger = logging.getLogger(__name__)

LONGEST_NAME = 100


@dataclass(eq=False, kw_only=True)
class EpisodeSession(Session):
    """A session of the gateway. Its ``sampling`` is the run's.

    Attributes:
        tree: what the agent program sent and received.
        models: names of models that requests may give, besides ``model``.
        tokenizer: of the policy, for the texts of tokens.
        limited: requests that were refused because the episode has used up its turns or tokens.
        ignored: what requests asked for that was not done, and how often.
        responses: conversations up to a response of ``/v1/responses``, by its id.
    """

    tree: TokenTree
    sampling: SamplingParams
    limits: EpisodeLimits
    tokenizer: Any = field(repr=False)
    models: Sequence[str] = ()
    limited: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    responses: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict, repr=False)
    _pending: int = 0
    _shortened: dict[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def check(self, body: Body) -> None:
        """Refuse an unknown model, and count what the run's sampling overrides.

        Raises:
            Refusal: the model is none of the episode's.
        """
        if body.model not in (self.model, *self.models) and "*" not in self.models:
            raise Refusal(
                404,
                f"the model {body.model!r} does not exist; use {self.model!r}, or list the names that your program "
                "uses in rollout.environment.command.models",
                "model",
            )
        given = body.model_extra or {}
        for name in SAMPLING & given.keys():
            if given[name] is not None and (name == "seed" or given[name] != getattr(self.sampling, name)):
                self.ignore(name, "the run's sampling decides it")

    def ignore(self, name: str, why: str) -> None:
        """Count that a request's wish is ignored."""
        name = name[:LONGEST_NAME]
        self.ignored[name] += 1
        _warn_once(name, why)

    async def sample(self, exchange: Exchange) -> list[Answer]:
        """Have the policy reply.

        Raises:
            Refusal: the episode has used up its turns or tokens, the chat format cannot write the conversation, or the
                engine failed.
        """
        for name in exchange.unsupported:
            self.ignore(name, "the policy's replies are sampled freely")
        turns = self.tree.turns + self._pending + exchange.n
        if turns > self.limits.max_turns:
            self.limited += 1
            limit = f"the episode has used up its {self.limits.max_turns} turns (rollout.environment.max_turns)"
            raise Refusal(400, limit)
        turn = self._prompt(self.tree, exchange.messages, exchange.tools)
        if turn.room < 1:
            self.limited += 1
            raise Refusal(
                400,
                f"the conversation has {len(turn.tokens)} tokens and leaves no room for a reply: the episode's maximum "
                "context length is reached (data.max_response_length, data.max_prompt_length)",
                "messages",
            )
        wanted = SamplingParams(
            max_tokens=min(exchange.max_tokens or turn.room, turn.room),
            stop=exchange.stop,
            stop_token_ids=turn.stop_tokens,
        )
        self._pending += exchange.n
        try:
            completions = await asyncio.gather(*(self.generate(turn.tokens, wanted) for _ in range(exchange.n)))
        finally:
            self._pending -= exchange.n
        return [self._recorded(turn, completion, exchange.stop) for completion in completions]

    def count_tokens(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        """Return the length of the prompt that a conversation would be.

        Raises:
            Refusal: the chat format cannot write it.
        """
        return len(self._prompt(copy(self.tree), messages, tools).tokens)

    def _prompt(
        self, tree: TokenTree, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> Turn:
        given = [self._shortened.get(_identity(message), message) for message in messages]
        try:
            return tree.prompt(given, tools)
        except DataError as error:
            raise Refusal(400, str(error), "messages") from error

    def _recorded(self, turn: Turn, completion: Completion, stops: Sequence[str]) -> Answer:
        reply = self.tree.add(turn, completion, logprobs=self.sampling.logprobs)
        message, text = reply.message, reply.message["content"] or ""
        found = min((stop for stop in stops if stop in text), key=text.index, default=None)
        if found is not None:
            message = {**message, "content": text[: text.index(found)]}
            self._shortened[_identity(message)] = reply.message
        return Answer(reply, completion, message, len(turn.tokens), found)

    def text_of_token(self, token: int) -> str:
        """Return the text of one token."""
        return str(self.tokenizer.decode([token]))


def _identity(message: Mapping[str, Any]) -> str:
    """Return what identifies a message that a client sends back."""
    return json.dumps([message.get(key) for key in ("role", "content", "tool_calls")], sort_keys=True, default=repr)


@lru_cache(1000)
def _warn_once(name: str, why: str) -> None:
    logger.warning("an agent program's requests set %s, which has no effect: %s", name, why)
