"""The tokens of a trajectory are exactly those that the policy saw and sampled."""

from __future__ import annotations

from rlcore.engines.episode import EpisodeLimits
from rlcore.engines.rollout import Completion
from rlcore_agents.conversation import TokenTree, format_for
from rlcore_kit.testing.tiny_model import tiny_tokenizer

LIMITS = EpisodeLimits(max_turns=8, max_tokens=1000, max_model_len=2000, timeout_s=10)
CALCULATOR = {
    "type": "function",
    "function": {"name": "calculator", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}


def test_a_conversation_with_a_tool_keeps_what_was_sampled() -> None:
    tokenizer = tiny_tokenizer()
    tree = TokenTree(format_for(tokenizer), LIMITS)
    messages = [{"role": "user", "content": "2+3?"}]
    first = tree.prompt(messages, [CALCULATOR])
    call = tokenizer.encode('<tool_call>{"name":"calculator", "arguments":{"x":"</tool_call>"}}</tool_call><|end|>')
    reply = tree.add(first, Completion(call, [-1.0] * len(call), "stop", [(3, len(call))]))
    assert reply.tool_calls[0].arguments == {"x": "</tool_call>"}
    messages += [reply.message, {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "5"}]
    second = tree.prompt(messages, [CALCULATOR])
    answer = tokenizer.encode("5<|end|>")
    tree.add(second, Completion(answer, [-0.5] * len(answer), "stop", [(4, len(answer))]))
    trajectory = tree.trajectory(score=1.0)
    assert [segment.sampled for segment in trajectory.segments] == [False, True, False, True]
    assert trajectory.rows() == [(0, 1, 2, 3)]
    assert [list(segment.tokens) for segment in trajectory.segments if segment.sampled] == [call, answer]
    assert trajectory.segments[1].versions == [(3, len(call))]
    assert [*trajectory.segments[0].tokens, *call, *trajectory.segments[2].tokens] == second.tokens
    assert second.room == 1000 - (len(second.tokens) - len(first.tokens))
    assert trajectory.metrics == {"turns": 2.0, "branches": 0.0, "malformed_calls": 0.0, "cut_off_turns": 0.0}
