"""NeMo Gym's HTTP protocol, against a server of ours that stands in for its resources servers.

The stand-in keeps a counter per session, as NeMo Gym's example of session state does, and reads responses with the
types of OpenAI's package, of which NeMo Gym's are subclasses.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses.response_input_item import FunctionCallOutput
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlcore import plugins
from rlcore.cli.command_tree import cli
from rlcore.engines import ModelSettings, RolloutEngine, SamplingParams
from rlcore.engines.episode import EpisodeLimits, EpisodeSpec, PromptSample, Trajectory
from rlcore.errors import ConfigError
from rlcore_agents.endpoint.server_thread import ServerThread
from rlcore_agents.nemo_gym.settings import NeMoGymSettings
from rlcore_kit.serving.ports import unused_port

LIMITS = EpisodeLimits(max_turns=6, max_tokens=3000, max_model_len=4000, timeout_s=60.0)
COUNT = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
TOOLS = [
    {"type": "function", "name": "increment_counter", "description": "Add.", "parameters": COUNT, "strict": True},
    {"type": "function", "name": "get_counter_value", "parameters": {"type": "object", "properties": {}}},
]


class CounterServer:
    """The stand-in.

    Attributes:
        verified: bodies of ``/verify``.
    """

    def __init__(self) -> None:
        self.counters: dict[str, int] = {}
        self.verified: list[dict[str, Any]] = []
        paths = {
            "/seed_session": self.seed_session,
            "/increment_counter": self.increment_counter,
            "/get_counter_value": self.get_counter_value,
            "/verify": self.verify,
        }
        self.app = Starlette(routes=[Route(path, call, methods=["POST"]) for path, call in paths.items()])

    async def seed_session(self, request: Request) -> Response:
        session = uuid.uuid4().hex
        self.counters[session] = (await request.json())["initial_count"]
        answer = JSONResponse({})
        answer.set_cookie("session", session, httponly=True, samesite="lax")
        return answer

    async def increment_counter(self, request: Request) -> Response:
        body = await request.json()
        if not isinstance(body.get("count"), int):
            return JSONResponse({"detail": "count must be an integer"}, 422)
        before = self.counters[request.cookies["session"]]
        await asyncio.sleep(0.01)
        self.counters[request.cookies["session"]] = before + body["count"]
        return JSONResponse({"success": True, "done": before + body["count"] > 90})

    async def get_counter_value(self, request: Request) -> Response:
        return JSONResponse({"count": self.counters[request.cookies["session"]]})

    async def verify(self, request: Request) -> Response:
        body = await request.json()
        self.verified.append(body)
        items = body["response"]["output"]
        results = [item for item in items if item["type"] == "function_call_output"]  # which NeMo Gym adds to outputs
        TypeAdapter(list[FunctionCallOutput]).validate_python(results)
        OpenAIResponse.model_validate({**body["response"], "output": [item for item in items if item not in results]})
        if body.get("broken") == "masked":
            return JSONResponse({**body, "reward": 0.0, "mask_sample": True, "failure_reason": "judge unavailable"})
        if body.get("broken") == "status":
            return PlainTextResponse("out of memory", 500)
        if body.get("broken") == "reward":
            return JSONResponse({**body, "reward": None})
        value = self.counters.pop(request.cookies["session"])
        return JSONResponse({**body, "reward": float(value == body["expected_count"]), "value": value})


@pytest.fixture(scope="module")
def counter() -> CounterServer:
    return CounterServer()


@pytest.fixture(scope="module")
def url(counter: CounterServer) -> Iterator[str]:
    thread = ServerThread(counter.app)
    yield thread.url
    thread.close()


def row(expected: int, **more: Any) -> dict[str, Any]:
    items = [
        {"role": "developer", "content": "Count."},
        {"role": "user", "content": "add 4, then 3", "type": "message"},
    ]
    params = {"input": items, "tools": TOOLS, "parallel_tool_calls": False}
    return {"responses_create_params": params, "initial_count": 3, "expected_count": expected, **more}


Play = Callable[..., Trajectory]


@pytest.fixture
def play(url: str, policy: Path, tmp_path: Path, scripted: Callable[[Callable[[str], str]], RolloutEngine]) -> Play:
    """Write a row of NeMo Gym as a data file and play it with given replies."""

    def run(task: dict[str, Any], replies: list[str], limits: EpisodeLimits = LIMITS, **options: Any) -> Trajectory:
        source, left = tmp_path / "rows.jsonl", list(replies)
        source.write_text(json.dumps(task) + "\n")
        words = ["data", "nemo-gym", "--source", source, "--out", tmp_path / "data", "--overwrite"]
        made = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
        assert made.exit_code == 0, made.output
        [read] = pq.read_table(tmp_path / "data" / "train.parquet").to_pylist()
        settings = NeMoGymSettings(**{"url": url, **options})
        spec = EpisodeSpec(ModelSettings(path=str(policy)), settings, SamplingParams(max_tokens=300), limits)
        runner = plugins.get("rlcore.environments", "nemo_gym").build(spec)
        try:
            sample = PromptSample([5], read["prompt"], extra=read["extra_info"])
            return asyncio.run(runner.run(scripted(lambda prompt: left.pop(0)), sample, 5))  # type: ignore[no-any-return]
        finally:
            runner.close()

    return run


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


BOTH = call("increment_counter", count=4) + call("increment_counter", count=3)


def test_tools_and_verifier_of_a_session(play: Play, counter: CounterServer) -> None:
    task = row(10, note=None)
    trajectory = play(task, [BOTH, call("get_counter_value"), "It is 10."])
    assert (trajectory.score, trajectory.invalid) == (1.0, "")
    assert trajectory.info["value"] == 10
    assert [message["role"] for message in trajectory.messages[:2]] == ["system", "user"]
    assert trajectory.metrics["tool_calls"] == 3
    body = counter.verified[-1]
    assert {key: body[key] for key in task} == task, "the verifier gets the row as it is in the file"
    kinds = [item["type"] for item in body["response"]["output"]]
    assert kinds == [
        *["function_call"] * 2,
        *["function_call_output"] * 2,
        "function_call",
        "function_call_output",
        "message",
    ]
    assert json.loads(body["response"]["output"][5]["output"]) == {"count": 10}
    assert body["response"]["output"][0]["call_id"] == body["response"]["output"][2]["call_id"]


def test_sessions_do_not_share_anything(play: Play) -> None:
    assert play(row(7), [call("increment_counter", count=4), "done"]).score == 1.0
    assert play(row(3), ["nothing"]).score == 1.0
    assert play(row(4), ["nothing"]).score == 0.0


def test_calls_that_the_server_refuses_are_answered(play: Play) -> None:
    trajectory = play(row(3), [call("increment_counter", count="four"), "sorry"])
    [answer] = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    assert "count must be an integer" in answer
    assert trajectory.score == 1.0


def test_a_limit_ends_the_episode_and_it_is_verified(play: Play, counter: CounterServer) -> None:
    short = EpisodeLimits(max_turns=1, max_tokens=3000, max_model_len=4000, timeout_s=60.0)
    trajectory = play(row(10), [BOTH], limits=short)
    assert (trajectory.score, trajectory.finish_reason) == (1.0, "length")
    assert counter.verified[-1]["response"]["status"] == "incomplete"


def test_a_result_may_end_the_episode(play: Play) -> None:
    assert play(row(103), [call("increment_counter", count=100)], done_flag=True).score == 1.0


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("masked", "the verifier could not measure the episode: judge unavailable"),
        ("status", "/verify of the resources server answered 500: out of memory"),
        ("reward", "the reward of /verify is None (NoneType), not a number"),
    ],
)
def test_a_verifier_that_fails_costs_the_episode(play: Play, broken: str, problem: str) -> None:
    assert problem in play(row(3, broken=broken), ["x"]).invalid


def test_mistakes(play: Play, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no resources server of NeMo Gym answers at http://127.0.0.1.*ConnectError"):
        play(row(3), [], url=f"http://127.0.0.1:{unused_port()}")
    image = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
    for line, message in [
        ("{", "line 2 is no row of NeMo Gym: JSONDecodeError"),
        ('{"question": 1}', "KeyError: 'responses_create_params'"),
        (json.dumps({"responses_create_params": {"input": [image]}}), "content of type 'input_image' is not supported"),
    ]:
        (tmp_path / "bad.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n")
        words = ["data", "nemo-gym", "--source", tmp_path / "bad.jsonl", "--out", tmp_path / "out"]
        assert re.sub(r"\s+", " ", message) in CliRunner().invoke(cli, list(map(str, words))).output
