"""A conversation with a model in a terminal, or over standard input."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import click

from rlcore.engines import GenerationRequest, RolloutEngine
from rlcore.errors import ConfigError, DataError, EngineError
from rlcore_recipes.data.chat import Message
from rlcore_recipes.data.end_tokens import check_tokens
from rlcore_recipes.generation.candidates import Candidate
from rlcore_recipes.generation.completions import check_length
from rlcore_recipes.generation.model import LoadedModel, loaded_model
from rlcore_recipes.run.seeds import sample_seed
from rlcore_recipes.settings.generation import GenerationConfig

HELP = "/reset forgets the conversation, /system TEXT sets the system prompt and forgets it, /quit (or Ctrl-D) ends"


def chat(config: GenerationConfig, candidate: Candidate) -> None:
    """Answer the lines of standard input until it ends.

    Raises:
        RlcoreError: the model cannot be loaded.
    """
    with loaded_model(config, candidate) as model:
        longest = _longest(model)
        with model.engine(longest, 1) as engine:
            conversation = Conversation(model, engine, longest - config.data.max_response_length)
            if sys.stdin.isatty():
                click.echo(f"{candidate.name}: {HELP}", err=True)
            for line in _lines():
                if line in ("/quit", "/exit"):
                    break
                said = conversation.command(line) if line.startswith("/") else _answer(conversation, line)
                click.echo(said, err=line.startswith("/"))


def _longest(model: LoadedModel) -> int:
    """Return the maximum tokens of a conversation and its next answer.

    Raises:
        ConfigError: the model has too few positions for an answer.
    """
    data, positions = model.config.data, model.positions
    longest = data.max_prompt_length + data.max_response_length
    if positions is not None and positions <= data.max_response_length:
        raise ConfigError(
            f"the model has {positions:,} positions, and an answer alone may have {data.max_response_length:,} tokens: "
            "lower --max-tokens (data.max_response_length)"
        )
    return longest if positions is None else min(longest, positions)


def _lines() -> Iterator[str]:
    """Yield the lines that the user writes, without empty ones; ask for them in a terminal."""
    asks = sys.stdin.isatty()
    if asks:
        with suppress(ImportError):
            import readline  # noqa: F401  # input() then has history and editing
    while True:
        try:
            line = input("> ") if asks else sys.stdin.readline()
        except EOFError:
            return
        if not asks and not line:
            return
        if line.strip():
            yield line.strip()


def _answer(conversation: Conversation, line: str) -> str:
    """Return the model's answer, or why there is none; the conversation goes on."""
    try:
        return conversation.answer(line)
    except (DataError, EngineError) as error:
        return f"[no answer: {error}; /reset begins a new conversation]"
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        return "[interrupted]"


class Conversation:
    """The messages so far, and the model that answers them.

    Args:
        most: maximum tokens of the messages.
    """

    def __init__(self, model: LoadedModel, engine: RolloutEngine, most: int) -> None:
        self._model = model
        self._engine = engine
        self._most = most
        self._system = model.config.data.system_prompt
        self._turn = 0
        self.messages: list[Message] = []
        self._reset()

    def _reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def command(self, line: str) -> str:
        """Do what a line that begins with a slash says; return what to tell the user."""
        name, _, text = line.partition(" ")
        if name == "/reset":
            self._reset()
            return "the conversation is forgotten"
        if name == "/system":
            self._system = text.strip() or None
            self._reset()
            return "the system prompt is set" if self._system else "there is no system prompt"
        if name == "/help":
            return HELP
        return f"there is no command {name}; {HELP}"

    def answer(self, text: str) -> str:
        """Return the model's answer to ``text``; both join the conversation once it is complete.

        Raises:
            DataError: the conversation is too long, or the chat template refuses it.
            EngineError: the engine cannot answer.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        where = "the conversation"
        prompt = asked if self._model.chats else "\n\n".join(message["content"] for message in asked)
        (tokens,) = self._model.renderer.prompt_tokens([prompt], [where])
        check_length(tokens, self._most, where)
        check_tokens(tokens, self._model.vocabulary, self._model.tokenizer, where)
        seed = sample_seed(self._model.config.seed, "chat", self._turn, 0)
        request = GenerationRequest(tokens, replace(self._model.sampling, seed=seed), request_id=f"chat-{self._turn}")
        self._turn += 1
        try:
            completion = asyncio.run(self._engine.generate(request))
        except KeyboardInterrupt:
            self._engine.abort([request.request_id])
            raise
        answer: str = self._model.tokenizer.decode(completion.tokens, skip_special_tokens=True).strip()
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer + (" […]" if completion.finish_reason == "length" else "")
