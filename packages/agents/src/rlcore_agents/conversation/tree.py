"""`TokenTree`: one episode's conversations, as the exact tokens that the policy saw and sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlcore.engines.episode import EpisodeLimits, Segment, Trajectory, sampled_segment
from rlcore.engines.rollout import Completion, FinishReason, GenerationRequest, SamplingParams
from rlcore_agents.conversation.chat_format import ChatFormat, RecordedTurn, Tools
from rlcore_agents.conversation.comparison import Comparable, comparable, extends, same
from rlcore_agents.conversation.reply import Message, ParsedCall, Reply, ToolCall
from rlcore_agents.conversation.segments import SegmentTree


@dataclass(frozen=True)
class Turn:
    """A prompt that awaits a reply.

    Attributes:
        tokens: the whole prompt.
        room: tokens that the reply may have under the limits; 0 or less if there is no room for one.
        stop_tokens: tokens that end the reply, besides the engine's own.
        continues: number of the reply whose tokens the prompt goes on from; None if it was rendered from its messages.
    """

    tokens: list[int]
    room: int
    messages: Sequence[Message]
    tools: Tools
    stop_tokens: tuple[int, ...] = ()
    continues: int | None = None

    def request(self, sampling: SamplingParams, seed: int | None, request_id: str) -> GenerationRequest:
        """Return the request of a reply under ``sampling``, within the room and with the format's stop tokens."""
        stop = tuple(dict.fromkeys((*sampling.stop_token_ids, *self.stop_tokens)))
        bounded = replace(sampling, max_tokens=min(sampling.max_tokens, self.room), stop_token_ids=stop, seed=seed)
        return GenerationRequest(self.tokens, bounded, request_id)


@dataclass(frozen=True)
class _Recorded:
    turn: RecordedTurn
    asked: list[Comparable]
    """messages of the prompt, as they are compared"""
    reply: Comparable
    node: int
    continues: int | None


class TokenTree:
    """The conversations of an episode.

    Several prompts may await their replies at the same time; what they share is found when replies are added.
    """

    def __init__(self, chat: ChatFormat, limits: EpisodeLimits) -> None:
        self.chat = chat
        self.limits = limits
        self._segments = SegmentTree()
        self._turns: list[_Recorded] = []
        self._transcript: list[Message] = []
        self._prompt: list[int] = []
        self._malformed = 0
        self._cut_off = 0
        self._finish: FinishReason = "stop"
        self._no_room = False

    @property
    def turns(self) -> int:
        """Replies so far."""
        return len(self._turns)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> Turn:
        """Return the prompt of a conversation, with the tokens of the recorded conversation that it continues.

        Args:
            messages: in the format of OpenAI's chat completions; replies of the policy as `Reply.message` has them.
            tools: their schemas, in the same format.

        Raises:
            DataError: the chat format cannot write this conversation.
        """
        tools = list(tools)
        sent = [comparable(message) for message in messages]
        known = self._known(sent)
        if known:  # replies as they were recorded: clients may have lost their reasoning
            length, number = known[0]
            turn = self._turns[number].turn
            messages = [*[*turn.messages, turn.message][:length], *messages[length:]]
        messages = list(messages)
        continues, tokens = self._continued(messages, tools, known)
        if tokens is None:
            tokens = self.chat.prompt(messages, tools)
        start = self._segments.prompt_length(tokens, None if continues is None else self._turns[continues].node)
        room = min(self.limits.max_model_len, start + self.limits.max_tokens) - len(tokens)
        if not self._prompt:
            self._prompt = tokens
        self._no_room = room < 1
        if self._no_room:
            self._transcript = messages
        return Turn(tokens, room, messages, tools, self.chat.stop_tokens, continues)

    def _known(self, sent: list[Comparable]) -> list[tuple[int, int]]:
        """Return turns whose prompts ``sent`` begins with, and how many messages they have in common, longest first."""
        known = []
        for number, recorded in enumerate(self._turns):
            length = len(recorded.asked)
            if extends(sent, recorded.asked):
                replied = len(sent) > length and same(recorded.reply, sent[length])
                known.append((length + replied, number))
        return sorted(known, reverse=True)

    def _continued(
        self, messages: list[Message], tools: Tools, known: list[tuple[int, int]]
    ) -> tuple[int | None, list[int] | None]:
        """Return the turn whose tokens can go on, and the tokens of the prompt."""
        for length, number in known:
            recorded = self._turns[number]
            turn = recorded.turn
            if list(turn.tools) != tools:
                continue
            if len(messages) == len(recorded.asked):
                return recorded.continues, list(turn.prompt)  # another reply to the same prompt
            if len(recorded.asked) < length < len(messages):
                tail = self.chat.continuation(turn, messages[length:])
                if tail is not None:
                    return number, [*turn.prompt, *turn.sampled, *tail]
        return None, None

    def add(self, turn: Turn, completion: Completion, logprobs: bool = True, state: str | None = None) -> Reply:
        """Record the reply to ``turn`` and return what it says.

        Args:
            logprobs: the engine was asked for log-probs.
            state: as `Segment.state`.
        """
        number = self.turns
        parsed = self.chat.parse(turn.tokens, completion.tokens, turn.tools)
        calls = [_named(call, number, place) for place, call in enumerate(parsed.calls)]
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.reasoning is not None:
            message["reasoning_content"] = parsed.reasoning
        if any(call.name for call in calls):
            message["tool_calls"] = [call.as_message() for call in calls if call.name]
        after = None if turn.continues is None else self._turns[turn.continues].node
        sampled = replace(sampled_segment(completion, logprobs), state=state)
        node = self._segments.add(turn.tokens, sampled, after)
        recorded = RecordedTurn(turn.messages, turn.tools, turn.tokens, completion.tokens, message)
        asked = [comparable(each) for each in turn.messages]
        self._turns.append(_Recorded(recorded, asked, comparable(message), node, turn.continues))
        self._transcript = [*turn.messages, message]
        self._malformed += sum(bool(call.error) for call in calls)
        self._cut_off += completion.finish_reason != "stop"
        self._finish = completion.finish_reason
        return Reply(message, calls, completion.finish_reason, number)

    def reward(self, reply: Reply, reward: float) -> None:
        """Give ``reply`` a reward, in addition to those it has."""
        self._segments.reward(self._turns[reply.turn].node, reward)

    def trajectory(
        self,
        score: float | None = None,
        invalid: str = "",
        info: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        messages: Sequence[Message] | None = None,
    ) -> Trajectory:
        """Return the episode.

        Its finish reason is "length" if the last prompt left no room for a reply. Without any reply it is the first
        prompt alone.

        Args:
            score, invalid, info: as in `Trajectory`.
            metrics: further numbers, besides ``turns``, ``branches`` (rows after the first), ``malformed_calls`` and
                ``cut_off_turns`` (replies that reached a limit).
            messages: the conversation; that of the last prompt and its reply by default.
        """
        segments = self._segments.ordered() or (Segment(self._prompt),)
        finish: FinishReason = "length" if self._no_room else self._finish
        trajectory = Trajectory(
            segments, finish, info or {}, score, invalid, self._transcript if messages is None else messages
        )
        counted = {
            "turns": float(self.turns),
            "branches": float(len(trajectory.rows()) - 1),
            "malformed_calls": float(self._malformed),
            "cut_off_turns": float(self._cut_off),
        }
        return replace(trajectory, metrics={**counted, **(metrics or {})})


def _named(call: ParsedCall, turn: int, place: int) -> ToolCall:
    """Return ``call`` with an id that is unique in the tree."""
    identity = call.id or f"c{turn:05d}{place:03d}"
    return ToolCall(identity, call.name, call.arguments, call.error, call.raw)
