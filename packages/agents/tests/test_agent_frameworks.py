"""Agents of the field's frameworks run in an episode unchanged, and their tokens are exactly those of the policy."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import agents
import openai
import pytest
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from rlcore.engines import ModelSettings, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec, PromptSample, Trajectory
from rlcore_agents.gateway.command import CommandEnvironment
from rlcore_agents.gateway.settings import CommandSettings

LIMITS = EpisodeLimits(max_turns=8, max_tokens=3000, max_model_len=4000, timeout_s=30)
SAMPLE = PromptSample([3], [{"role": "user", "content": "2+3?"}])
Agent = Callable[[str, str, Any], Awaitable[Any]]
Play = Callable[[Agent, Any], Trajectory]


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.fixture
def play(policy: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Run one episode of an agent."""
    agents.set_tracing_disabled(True)

    def episode(agent: Agent, engine: Any) -> Trajectory:
        module = ModuleType("my_agents")
        module.agent = agent  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "my_agents", module)
        options = CommandSettings(function="my_agents:agent")
        spec = EpisodeSpec(
            ModelSettings(path=str(policy)), options, SamplingParams(200), LIMITS, end_tokens=frozenset({1})
        )
        environment = CommandEnvironment(spec)
        try:
            trajectory = asyncio.run(environment.run(engine, SAMPLE, seed=1))
        finally:
            environment.close()
        assert not trajectory.invalid
        found = [list(segment.tokens) for segment in trajectory.segments if segment.sampled]
        assert found == [completion.tokens for _, completion in engine.made]
        return trajectory

    return episode


@pytest.mark.parametrize("protocol", ["chat_completions", "responses"])
def test_openai_agents_use_tools_and_hand_over(play: Play, scripted: Any, protocol: str) -> None:
    @agents.function_tool
    def add(a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)

    async def agent(base_url: str, api_key: str, sample: Any) -> bool:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        kind = agents.OpenAIChatCompletionsModel if protocol == "chat_completions" else agents.OpenAIResponsesModel
        model = kind("policy", client)
        adder = agents.Agent(name="Adder", instructions="Add.", tools=[add], model=model)
        boss = agents.Agent(name="Boss", instructions="Hand over.", handoffs=[adder], model=model)
        result = await agents.Runner.run(boss, sample["messages"][0]["content"])
        assert result.last_agent is adder
        return bool(result.final_output == "It is 5.")

    engine = scripted([call("transfer_to_adder", "{}"), call("add", '{"a": 2, "b": 3}'), "It is 5."])
    trajectory = play(agent, engine)
    assert trajectory.score == 1.0
    # the adder has instructions and tools, so its conversation is a second row
    assert [len([i for i in row if trajectory.segments[i].sampled]) for row in trajectory.rows()] == [1, 2]
    assert trajectory.metrics["branches"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_pydantic_ai_uses_tools(play: Play, scripted: Any, stream: bool) -> None:
    async def agent(base_url: str, api_key: str, sample: Any) -> bool:
        provider = OpenAIProvider(base_url=base_url, api_key=api_key)
        one = PydanticAgent(OpenAIChatModel("policy", provider=provider), instructions="Be brief.")

        @one.tool_plain
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        question = sample["messages"][0]["content"]
        if not stream:
            return (await one.run(question)).output == "It is 5."
        async with one.run_stream(question) as result:
            return await result.get_output() == "It is 5."

    trajectory = play(agent, scripted([call("add", '{"a": 2, "b": 3}'), "It is 5."]))
    assert trajectory.score == 1.0
    assert len(trajectory.rows()) == 1
    assert [message["role"] for message in trajectory.messages][-3:] == ["assistant", "tool", "assistant"]


def test_sub_agents_that_run_at_the_same_time_are_rows_of_one_trajectory(play: Play, scripted: Any) -> None:
    async def agent(base_url: str, api_key: str, sample: Any) -> float:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:

            async def ask(role: str) -> str:
                messages: Any = [{"role": "system", "content": f"You are {role}."}, *sample["messages"]]
                answer = await client.chat.completions.create(model="policy", messages=messages)
                return str(answer.choices[0].message.content)

            return float(len(set(await asyncio.gather(*map(ask, ("a", "b", "c"))))))

    trajectory = play(agent, scripted(lambda prompt: prompt.split("You are ")[1][0]))
    assert trajectory.score == 3.0
    assert len(trajectory.rows()) == 3


def test_episodes_that_run_at_the_same_time_and_in_one_loop_after_another_stay_apart(
    policy: Path, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def agent(base_url: str, api_key: str, sample: Any) -> bool:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            history = list(sample["messages"])
            for _ in range(3):
                answer = await client.chat.completions.create(model="policy", messages=history)
                history += [answer.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "on"}]
        return all(message["content"] in ("on", sample["ground_truth"]) for message in history[1:])

    module = ModuleType("my_agents")
    module.agent = agent  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_agents", module)
    options = CommandSettings(function="my_agents:agent")
    spec = EpisodeSpec(ModelSettings(path=str(policy)), options, SamplingParams(200), LIMITS, end_tokens=frozenset({1}))
    environment = CommandEnvironment(spec)
    engine = scripted(lambda prompt: prompt.split("name ")[1][0])
    samples = [PromptSample([3], [{"role": "user", "content": f"name {name}"}], name) for name in "abcdefghijkl"]

    async def together() -> list[Trajectory]:
        return await asyncio.gather(
            *(environment.run(engine, sample, seed) for seed, sample in enumerate(samples)),
        )

    try:
        found = [*asyncio.run(together()), *asyncio.run(together())]
    finally:
        environment.close()
    for sample, trajectory in zip(samples * 2, found, strict=True):
        assert (trajectory.score, trajectory.invalid, len(trajectory.rows())) == (1.0, "", 1)
        reply = engine.tokenizer.encode(f"{sample.ground_truth}<|end|>")
        assert [list(segment.tokens) for segment in trajectory.segments if segment.sampled] == [reply] * 3


def test_requests_that_an_agent_leaves_behind_have_left_the_engine_when_its_episode_ends(
    play: Play, scripted: Any
) -> None:
    class Slow(scripted):  # type: ignore[misc]
        left = 0

        async def generate(self, request: Any) -> Any:
            if self.made:
                self.left += 1
                try:
                    await asyncio.sleep(60)
                finally:
                    self.left -= 1
            return await super().generate(request)

    engine = Slow(["one"])
    behind: set[Any] = set()

    async def agent(base_url: str, api_key: str, sample: Any) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        ask: Any = {"model": "policy", "messages": sample["messages"]}
        await client.chat.completions.create(**ask)
        behind.add(asyncio.ensure_future(client.chat.completions.create(**ask)))
        while not engine.left:
            await asyncio.sleep(0.01)
        return 1.0

    assert play(agent, engine).score == 1.0
    assert engine.left == 0
