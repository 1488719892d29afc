"""What users write: an `Environment`, whose steps are `Step` objects."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlcore.engines.episode import PromptSample
from rlcore_agents.conversation import Reply
from rlcore_agents.tools import Tool

Message = Mapping[str, Any]
AnyTool = Tool | Callable[..., Any]
Opening = str | Sequence[Message] | None


@dataclass(frozen=True)
class Step:
    """What an environment answers to a reply of the policy.

    Attributes:
        observation: text of the next user message, or messages in OpenAI's format. None only at the end.
        reward: of this turn alone; estimators that know turns give it to the turn's tokens.
        done: the episode ends.
        score: of the whole episode, at its end; all turns share it. Rewards of turns are in addition.
        info: what is known about the episode. Reward functions find it among the sample's ``extra``, and its numbers
            become metrics ``rollout/env/<name>``. Later steps replace values of earlier ones.
        state: name of the state in which the policy takes its next turn: the advantage estimator ``gigpo`` compares
            turns of a prompt's episodes with equal states. None: all tokens so far are the state.
    """

    observation: str | Sequence[Message] | None = None
    reward: float | None = None
    done: bool = False
    score: float | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    state: str | None = None


class Environment:
    """The world of one episode; every episode has its own object, made with the configured ``kwargs``.

    Methods may be coroutines or plain functions; plain ones run in threads. What they raise, and a call that exceeds
    ``turn_timeout_s``, makes the episode invalid and does not end the run. A subclass with ``tools`` alone is complete:
    the episode ends with the first reply that calls no tool, and a reward function scores it.

    Attributes:
        tools: what the policy may call: functions with type hints, or `Tool` objects. Calls are answered without
            `step`. It is read before every reply.
    """

    tools: Sequence[AnyTool] = ()

    def reset(self, sample: PromptSample, seed: int) -> Opening | Awaitable[Opening]:
        """Begin the episode and return how the conversation opens.

        Args:
            sample: the prompt: its messages, ground truth, and the other columns of its row as ``extra``.
            seed: the only source of randomness, different for every episode.

        Returns:
            None: the messages of the sample; a text: it is the only message, of the user; or all messages.
        """
        return None

    def step(self, reply: Reply) -> Step | Awaitable[Step]:
        """Answer a reply of the policy that calls no tool."""
        return Step(done=True)

    def close(self) -> Awaitable[None] | None:
        """Release what the environment holds. It is called once, also after errors, timeouts and cancellation."""
        return None
