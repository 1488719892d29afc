"""The environment `tools`: a conversation with configured tools, played by a scripted policy."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.engines import ModelSettings, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeRunner, EpisodeSpec, PromptSample, Trajectory
from rlcore_kit.testing.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAMPLE = PromptSample(
    TOKENIZER.encode("<|user|>hi<|end|><|assistant|>"), [{"role": "user", "content": "hi"}], position=12
)
LIMITS = EpisodeLimits(max_turns=4, max_tokens=1000, max_model_len=1200, timeout_s=60.0)


def runner_of(policy: Path, **options: Any) -> EpisodeRunner:
    plugin = plugins.get("rlcore.environments", "tools")
    settings = plugin.config_class().model_validate(options)
    spec = EpisodeSpec(ModelSettings(path=str(policy)), settings, SamplingParams(max_tokens=200, seed=0), LIMITS)
    runner: EpisodeRunner = plugin.build(spec)
    return runner


Play = Callable[..., Trajectory]


@pytest.fixture
def play(policy: Path, scripted: type[Any]) -> Play:
    """Plays an episode whose policy answers what a function says of the prompt."""

    def play(answer: Callable[[str], str], **options: Any) -> Trajectory:
        runner = runner_of(policy, **options)
        try:
            return asyncio.run(runner.run(scripted(answer), SAMPLE, 5))
        finally:
            runner.close()

    return play


def call(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def test_calls_are_answered_until_a_reply_calls_nothing(play: Play) -> None:
    def answer(prompt: str) -> str:
        return "it is 42" if "42" in prompt else call("calculator", '{"expression": "6 * 7"}')

    trajectory = play(answer, tools=["calculator"])

    assert (trajectory.invalid, trajectory.score, trajectory.finish_reason) == ("", None, "stop")
    assert [message["role"] for message in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    assert trajectory.messages[2]["content"] == "42"
    sampled = [TOKENIZER.decode(segment.tokens) for segment in trajectory.segments if segment.sampled]
    assert sampled == [call("calculator", '{"expression": "6 * 7"}') + "<|end|>", "it is 42<|end|>"]
    assert {name: trajectory.metrics[name] for name in ("turns", "tool_calls", "tool_errors", "malformed_calls")} == {
        "turns": 2, "tool_calls": 1, "tool_errors": 0, "malformed_calls": 0,
    }  # fmt: skip


def test_malformed_calls_are_answered_and_counted_until_the_turns_are_used_up(play: Play) -> None:
    def answer(prompt: str) -> str:
        wrong = [call("calculator", '{"expression": '), call("calculater", "{}"), call("calculator", '{"x": 1}')]
        return wrong[min(prompt.count("Error: "), 2)]

    trajectory = play(answer, tools=["calculator"])

    answers = [str(message["content"]) for message in trajectory.messages if message["role"] == "tool"]
    assert "not valid JSON" in answers[0]
    assert "there is no tool 'calculater'; did you mean 'calculator'?" in answers[1]
    assert "expression: Missing required argument" in answers[2]
    assert trajectory.metrics["malformed_calls"] == trajectory.metrics["tool_errors"] >= 3
    assert trajectory.metrics["truncated"] == 1
    assert not trajectory.invalid


def test_a_tool_whose_server_dies_makes_its_episode_invalid(play: Play) -> None:
    server = {"command": [sys.executable, str(Path(__file__).parent / "stdio_server.py")]}
    trajectory = play(lambda prompt: call("count2", "{}"), mcp=[server])

    assert "it is gone, in a call of 'count2'" in trajectory.invalid
    assert [segment.sampled for segment in trajectory.segments] == [False, True]


def test_without_tools_the_settings_are_refused(policy: Path) -> None:
    with pytest.raises(ValidationError, match=r"needs tools \(such as tools=\[calculator\]\) or mcp servers"):
        runner_of(policy)
