"""`nemo_gym`: an episode with the tools and the verifier of a resources server.

The calls are those of NeMo Gym's own agents: ``/seed_session`` with the row, ``/<tool>`` with the arguments of a call,
and ``/verify`` with the row and the Response; cookies carry the session.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from rlcore.boundary import reason
from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample
from rlcore.errors import ConfigError
from rlcore_agents.environment import Chat, EpisodeTruncated
from rlcore_agents.environment.checks import number, short
from rlcore_agents.environment.exchange import EnvironmentFailure
from rlcore_agents.environment.shipped import shipped_runner
from rlcore_agents.nemo_gym.data_set import row_of
from rlcore_agents.nemo_gym.responses import function_tools, response
from rlcore_agents.nemo_gym.settings import NeMoGymSettings
from rlcore_agents.tools import Tool, ToolFailure, run_tools

ANSWER_TIMEOUT_S = 10.0


async def play(
    chat: Chat, sample: PromptSample, *, url: str, headers: Mapping[str, str], done_flag: bool, max_characters: int
) -> float:
    """Play an episode and return the verifier's reward; arguments as in `NeMoGymSettings`."""
    row = row_of(sample)
    params, begin = row["responses_create_params"], len(chat.messages)
    # turn_timeout_s bounds every call
    async with httpx.AsyncClient(base_url=url, headers=dict(headers), timeout=None) as client:
        session = Session(client, done_flag)
        await session.post("/seed_session", row)
        tools = [session.tool(tool, max_characters) for tool in function_tools(params)]
        complete = await _converse(chat, tools, session)
        reply = response(chat.messages[begin:], params, complete)
        result = await session.post("/verify", {**row, "response": reply})
    if result.get("mask_sample"):
        why = result.get("failure_reason") or result.get("failure_kind") or "no reason given"
        raise EnvironmentFailure(f"the verifier could not measure the episode: {why}")
    known = {*row, "response", "reward", "mask_sample"}
    chat.info |= {key: value for key, value in result.items() if key not in known and isinstance(value, int | float)}
    return number(result.get("reward"), "the reward of /verify")


async def _converse(chat: Chat, tools: Sequence[Tool], session: Session) -> bool:
    """Let the policy reply and call tools until a reply calls none; return False if a limit ended that."""
    schemas = [tool.schema() for tool in tools]
    while not session.done:
        try:
            reply = await chat.complete(chat.messages, schemas)
        except EpisodeTruncated:
            return False
        chat.messages.append(reply.message)
        if not reply.tool_calls:
            break
        chat.messages += await run_tools(tools, reply.tool_calls, chat.tool_use)
    return True


class Session:
    """Calls of a resources server in one session.

    Attributes:
        done: a tool has said that the episode ends.
    """

    def __init__(self, client: httpx.AsyncClient, done_flag: bool) -> None:
        self.done = False
        self._client, self._done_flag = client, done_flag
        self._in_order = asyncio.Lock()  # calls of one reply change the session one after the other

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the server answers.

        Raises:
            EnvironmentFailure: it does not answer, or not with success and a JSON object.
        """
        try:
            answer = await self._client.post(path, json=body)
            answer.raise_for_status()
            value = answer.json()
        except httpx.HTTPStatusError as error:
            raise EnvironmentFailure(
                f"{path} of the resources server answered {error.response.status_code}: {error.response.text[:300]}"
            ) from None
        except (httpx.HTTPError, ValueError) as error:
            raise EnvironmentFailure(f"{path} of the resources server failed: {reason(error)}") from error
        if not isinstance(value, dict):
            raise EnvironmentFailure(f"{path} of the resources server answered {short(value)}, not an object")
        return value

    def tool(self, tool: Mapping[str, Any], max_characters: int) -> Tool:
        """Return a tool of the server; its answers go to the policy as they are, those of failed calls too."""

        async def call(arguments: dict[str, Any]) -> str:
            async with self._in_order:
                try:
                    answer = await self._client.post(f"/{tool['name']}", json=arguments)
                except httpx.HTTPError as error:
                    raise ToolFailure(f"the resources server failed: {reason(error)}") from error
            self.done = self.done or (self._done_flag and _says_done(answer.text))
            return answer.text

        description, parameters = tool.get("description") or "", tool.get("parameters") or {}
        return Tool(tool["name"], description, parameters, call, max_characters=max_characters)


def _says_done(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and bool(value.get("done"))


def nemo_gym_environment(spec: EpisodeSpec) -> EpisodeRunner:
    """Return what runs episodes with a resources server.

    Raises:
        ConfigError: no server answers.
    """
    options = spec.options
    assert isinstance(options, NeMoGymSettings)
    try:
        httpx.get(options.url, headers=options.headers, timeout=ANSWER_TIMEOUT_S)  # whatever it says of this path
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"no resources server of NeMo Gym answers at {options.url}: {reason(error)}") from error
    return shipped_runner(
        spec,
        options,
        "rlcore_agents.nemo_gym.environment:play",
        url=options.url.rstrip("/"),
        headers=options.headers,
        done_flag=options.done_flag,
        max_characters=options.max_observation_chars,
    )
