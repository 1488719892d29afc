"""Bodies of requests to the gateway, and settings of the environment ``command``. Imports no server."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from rlcore.config import FileName, FilePath
from rlcore.engines.reward import LARGEST_SCORE
from rlcore.object_path import checked_object_path
from rlcore_agents.conversation import ConversationSettings

SAMPLING = frozenset({"temperature", "top_p", "top_k", "min_p", "seed"})
"""Parameters that the run's sampling decides, whatever requests say."""


class Body(BaseModel):
    """Fields that all protocols have.

    Attributes:
        without_effect: further fields that do not change a reply.
    """

    model_config = ConfigDict(extra="allow")
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "store", "service_tier", "user", "safety_identifier", "truncation", "cache_control"}
        | {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "stream_options"}
    )

    model: str
    stream: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def unsupported(self) -> Iterator[str]:
        """Yield what the request asks for that rollout engines cannot do."""
        for name, value in (self.model_extra or {}).items():
            neutral = value in (None, False, 0, [], {}) or (name, value) == ("response_format", {"type": "text"})
            if not neutral and name not in self.without_effect | SAMPLING:
                yield name
        choice = self.tool_choice.get("type") if isinstance(self.tool_choice, dict) else self.tool_choice
        if choice not in (None, "auto", "none"):
            yield f"tool_choice {choice}"
        one_call = isinstance(self.tool_choice, dict) and self.tool_choice.get("disable_parallel_tool_use")
        if self.parallel_tool_calls is False or one_call:
            yield "parallel_tool_calls false"

    def offered_tools(self) -> list[dict[str, Any]]:
        """Return the tools that may be called."""
        choice = self.tool_choice.get("type") if isinstance(self.tool_choice, dict) else self.tool_choice
        return [] if choice == "none" else self.tools or []


class ChatBody(Body):
    """Body of ``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[str] | str | None = None
    logprobs: bool | None = None
    stream_options: dict[str, Any] | None = None


class ResponseText(BaseModel):
    """Field ``text`` of `ResponsesBody`."""

    format: dict[str, Any] | None = None


class ResponsesBody(Body):
    """Body of ``/v1/responses``."""

    input: list[dict[str, Any]] | str = ""
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: str | None = None
    include: list[str] | None = None
    text: ResponseText | None = None

    def unsupported(self) -> Iterator[str]:
        """Yield what the request asks for that rollout engines cannot do."""
        yield from super().unsupported()
        kind = ((self.text and self.text.format) or {}).get("type", "text")
        if kind != "text":
            yield f"text.format {kind}"


class CountBody(Body):
    """Body of ``/v1/messages/count_tokens``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    system: list[dict[str, Any]] | str | None = None


class MessagesBody(CountBody):
    """Body of ``/v1/messages``."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None


class CommandSettings(ConversationSettings):
    """Settings of `command`: an agent program, or a function in Python, that reaches the policy by HTTP."""

    command: str | None = Field(
        None,
        description="The program and its arguments, e.g. 'python my_agent.py'; it is started for each episode, without "
        "a shell. Words that name files below the current folder are made absolute.",
    )
    function: FileName | None = Field(
        None,
        description="In place of a command: 'file.py:name' or 'package.module:name' of an async function that takes "
        "the base URL, the API key and the sample, and returns a score. It runs in the rollout process.",
    )
    folder: FilePath | None = Field(
        None, description="Working directory of the program; null: an empty folder for each episode, deleted after it."
    )
    models: tuple[str, ...] = Field(
        (),
        description="Names of models that the program uses; each means the policy, as 'policy' always does. '*': any.",
    )
    pass_env: tuple[str, ...] = Field(
        (),
        description="Environment variables (API keys …) that the program sees besides PATH, HOME, locale and the like.",
    )
    truncated_score: float | None = Field(
        0.0,
        ge=-LARGEST_SCORE,
        le=LARGEST_SCORE,
        description="Score of an episode whose program failed once its turns or tokens were used up; null: the episode "
        "is invalid.",
    )
    max_output_kb: int = Field(
        64, gt=0, le=2**20, description="Output (stdout and stderr) of a program that is kept, its end, in KiB."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.command is None) == (self.function is None):
            yield "command", "exactly one of command and function must be given"

    @field_validator("command")
    @classmethod
    def _is_a_command(cls, command: str | None) -> str | None:
        if command is not None and not words(command):
            raise ValueError("it names no program")
        return command

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, function: str | None) -> str | None:
        return None if function is None else checked_object_path(function)


def words(command: str) -> list[str]:
    """Return program and arguments of a command line.

    Raises:
        ValueError: a quotation does not end.
    """
    return shlex.split(command)


class ProgramResult(BaseModel):
    """What a program writes to the file RLCORE_RESULT, or a function returns.

    Attributes:
        score: of the episode; True is 1.
        info: what the program knows besides; rewards find it among the sample's ``extra``.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    score: float | None = Field(None, ge=-LARGEST_SCORE, le=LARGEST_SCORE)
    info: dict[str, JsonValue] = {}
