"""What goes between an episode's environment and its runner: requests and an outcome one way, replies the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlcore_agents.conversation import Reply


@dataclass(frozen=True)
class Request:
    """The environment asks for a reply of the policy to a conversation; both as in OpenAI's chat completions.

    Attributes:
        state: as `Step.state`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    state: str | None = None


@dataclass
class Outcome:
    """How an episode ended.

    Attributes:
        rewards: of turns, with the number of the reply.
        info: of JSON values.
        metrics: numbers to log.
        error: what the environment did wrong; "" if nothing.
    """

    score: float | None = None
    rewards: list[tuple[int, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


Policy = Callable[[Request], Awaitable[Reply | None]]
"""Returns the reply to a request; None if a limit of the episode leaves no room for one."""


class EnvironmentFailure(Exception):
    """The environment did something wrong; a sentence without its end says what."""
