"""Environment servers of OpenEnv, started here."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State

from rlcore import plugins
from rlcore.engines import ModelSettings, RolloutEngine, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeRunner, EpisodeSpec, PromptSample, Trajectory
from rlcore.errors import ConfigError
from rlcore_agents.openenv.settings import OpenEnvSettings
from rlcore_kit.serving.ports import unused_port

LIMITS = EpisodeLimits(max_turns=6, max_tokens=3000, max_model_len=4000, timeout_s=60.0)
SAMPLE = PromptSample([5], [{"role": "user", "content": "-"}], extra={"seed": 7})


class Word(Action):
    word: str


class Heard(Observation):
    text: str = ""


class Echo(Environment):  # type: ignore[misc]
    """Repeats words and rewards their length; "stop" ends it, "raise", "hang" and "exit" break it."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    stop_server: Callable[[], None]
    live = 0

    def __init__(self) -> None:
        super().__init__()
        Echo.live += 1

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Heard:
        return Heard(text=f"seed {seed}, {kwargs}")

    def step(self, action: Word, timeout_s: float | None = None, **kwargs: Any) -> Heard:
        if action.word == "raise":
            raise KeyError("door")
        if action.word == "hang":
            time.sleep(2.0)
        if action.word == "exit":
            Echo.stop_server()
            time.sleep(0.5)
        return Heard(text=action.word.upper(), reward=float(len(action.word)), done=action.word == "stop")

    @property
    def state(self) -> State:
        return State()

    def close(self) -> None:
        Echo.live -= 1


class Move(Action):
    x: int
    y: int = 0


class Board(Observation):
    x: int
    legal: tuple[int, ...] = ()


class Walk(Environment):  # type: ignore[misc]
    """Actions and observations with several fields."""

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Board:
        return Board(x=0, legal=(1, 2))

    def step(self, action: Move, timeout_s: float | None = None, **kwargs: Any) -> Board:
        return Board(x=action.x, done=True, reward=1.0 if action.x == 2 else 0.0)

    @property
    def state(self) -> State:
        return State()


class Tools(MCPEnvironment):  # type: ignore[misc]
    """Offers a tool over MCP."""

    def __init__(self) -> None:
        server = FastMCP("tools")

        @server.tool
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        super().__init__(server)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Observation:
        return Heard(text="What is 2 + 3?")

    def _step_impl(self, action: Action, timeout_s: float | None = None, **kwargs: Any) -> Observation:
        return Observation()

    @property
    def state(self) -> State:
        return State()


class Served:
    """A server in a thread."""

    def __init__(self, app: Any) -> None:
        self.port = unused_port()
        config = uvicorn.Config(
            app, port=self.port, log_config=None, ws="websockets-sansio", timeout_graceful_shutdown=0
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True


def served(environment: type, action: type, observation: type, sessions: int = 1) -> Served:
    return Served(create_fastapi_app(environment, action, observation, max_concurrent_envs=sessions))


@pytest.fixture(scope="module")
def echo() -> Iterator[Served]:
    server = served(Echo, Word, Heard, sessions=2)
    yield server
    server.stop()


Play = Callable[..., Trajectory]


@pytest.fixture
def runner_of(policy: Any) -> Callable[..., EpisodeRunner]:
    def build(url: str, **options: Any) -> EpisodeRunner:
        settings = OpenEnvSettings(url=url, **options)
        spec = EpisodeSpec(ModelSettings(path=str(policy)), settings, SamplingParams(max_tokens=64), LIMITS)
        return plugins.get("rlcore.environments", "openenv").build(spec)  # type: ignore[no-any-return]

    return build


@pytest.fixture
def play(runner_of: Callable[..., EpisodeRunner], scripted: Callable[[Callable[[str], str]], RolloutEngine]) -> Play:
    def run(url: str, answers: list[str], **options: Any) -> Trajectory:
        runner, left = runner_of(url, **options), list(answers)
        try:
            return asyncio.run(runner.run(scripted(lambda prompt: left.pop(0)), SAMPLE, 5))
        finally:
            runner.close()

    return run


def said(trajectory: Trajectory) -> list[str]:
    return [message["content"] for message in trajectory.messages if message["role"] != "assistant"]


def test_a_session_of_a_server_is_an_episode(play: Play, echo: Served) -> None:
    trajectory = play(echo.url, ["door", "stop"], reset={"level": 2})
    assert said(trajectory) == ["seed 7, {'level': 2}", "DOOR"]
    assert [segment.reward for segment in trajectory.segments if segment.sampled] == [4.0, 4.0]
    assert not trajectory.invalid


def test_more_episodes_than_sessions_wait_for_each_other(
    runner_of: Callable[..., EpisodeRunner], scripted: Callable[[Callable[[str], str]], RolloutEngine], echo: Served
) -> None:
    runner = runner_of(echo.url)

    async def many() -> list[Trajectory]:
        engine = scripted(lambda prompt: "stop" if "DOOR" in prompt else "door")
        return await asyncio.gather(*(runner.run(engine, SAMPLE, seed) for seed in range(5)))

    assert [trajectory.invalid for trajectory in asyncio.run(many())] == [""] * 5
    runner.close()


def test_a_server_without_a_free_session(play: Play, runner_of: Callable[..., EpisodeRunner]) -> None:
    server = served(Walk, Move, Board)

    async def hold() -> Trajectory:
        from openenv.core.generic_client import GenericEnvClient

        async with GenericEnvClient(server.url) as client:
            await client.reset()
            return await asyncio.to_thread(play, server.url, ["x"], turn_timeout_s=2.0)

    assert "had no free session for 1.6 s; start it with a larger max_concurrent_envs" in asyncio.run(hold()).invalid
    server.stop()


def test_actions_with_several_fields_are_json(play: Play) -> None:
    server = served(Walk, Move, Board)
    replies = ["left", "[2]", '{"x": "far"}', '```json\n{"x": 2}\n```']
    trajectory = play(server.url, replies)
    first, *answers = said(trajectory)
    assert first.startswith(
        '{"x": 0, "legal": [1, 2]}\n\nReply with one JSON object that fits this schema:\n{"properties"'
    )
    assert "metadata" not in first
    assert [text.split(":")[0] for text in answers] == [
        "Your reply is not a JSON object",
        "Your reply is JSON, but not an object",
        "The environment does not take this action.",
    ]
    assert trajectory.metrics["env/refused_actions"] == 3
    assert [segment.reward for segment in trajectory.segments if segment.sampled][-1] == 1.0
    assert said(play(server.url, ["2"], action_field="x", observation_field="legal"))[0] == "[1, 2]"
    assert "observations have no field 'y', only x, legal" in play(server.url, [], observation_field="y").invalid
    with pytest.raises(ConfigError, match=r"have no field 'z', only metadata, x, y"):
        play(server.url, [], action_field="z")
    server.stop()


def test_tools_of_a_server_are_offered(play: Play) -> None:
    server = served(Tools, CallToolAction, CallToolObservation)
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
    trajectory = play(server.url, [call, "5"])
    assert not trajectory.invalid
    assert said(trajectory)[-1] == "5"
    assert trajectory.metrics["tool_calls"] == 1
    server.stop()


def test_a_server_that_fails_or_ends_costs_the_episode(play: Play, echo: Served) -> None:
    assert re.search(
        r"the environment server failed: RuntimeError: .*door.*EXECUTION_ERROR", play(echo.url, ["raise"]).invalid
    )
    other = served(Echo, Word, Heard)
    Echo.stop_server = staticmethod(other.stop)  # type: ignore[assignment]
    trajectory = play(other.url, ["door", "exit"])
    assert "ConnectionClosed" in trajectory.invalid
    assert [segment.sampled for segment in trajectory.segments].count(True) == 2


def test_a_server_that_hangs_keeps_no_session(play: Play, echo: Served) -> None:
    before = Echo.live
    assert "the environment took longer than turn_timeout_s=1" in play(echo.url, ["hang"], turn_timeout_s=1.0).invalid
    deadline = time.monotonic() + 5
    while Echo.live > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert Echo.live == before


def test_no_server(play: Play) -> None:
    with pytest.raises(
        ConfigError, match=r"no environment server of OpenEnv answers at http://127.0.0.1:.*ConnectError"
    ):
        play(f"http://127.0.0.1:{unused_port()}", [])
    with pytest.raises(ValueError, match="url"):
        OpenEnvSettings(url="localhost:8000")
