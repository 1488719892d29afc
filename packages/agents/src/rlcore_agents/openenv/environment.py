"""`openenv`: one episode is a session of an environment server, over OpenEnv's WebSocket protocol by its own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from rlcore.boundary import reason
from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample
from rlcore.errors import ConfigError
from rlcore_agents.conversation import Reply
from rlcore_agents.environment import Environment, Step
from rlcore_agents.environment.exchange import EnvironmentFailure
from rlcore_agents.environment.shipped import opening, seed_of, shipped_runner
from rlcore_agents.openenv.actions import action_of, described, has_tools, text_field, text_of
from rlcore_agents.openenv.settings import OpenEnvSettings
from rlcore_agents.tools.tool import Tool, ToolFailure

SCHEMA_TIMEOUT_S = 10.0
RETRY_S = 0.25
"""Seconds between attempts to get a session of a server that has no free one."""


class OpenEnvEnvironment(Environment):
    """One session. Rewards of steps are those of turns; those of tool calls count for the next turn without calls.

    A reply that is no action, or one that the server refuses, is answered with the reason. What the server fails at
    makes the episode invalid.

    Args:
        schema: JSON schema of actions.
        wait_s: seconds to wait for a session of a server that has no free one.
        reset_arguments, action_field, observation_field: as in `OpenEnvSettings`.
    """

    def __init__(
        self,
        url: str,
        schema: Mapping[str, Any],
        reset_arguments: Mapping[str, Any],
        action_field: str | None,
        observation_field: str | None,
        wait_s: float,
    ) -> None:
        self._url, self._schema, self._arguments, self._wait_s = url, schema, reset_arguments, wait_s
        self._action_field = action_field or text_field(schema)
        self._observation_field = observation_field
        self._client: Any = None
        self._refused = 0
        self._over, self._tool_reward = False, 0.0

    async def reset(self, sample: PromptSample, seed: int) -> list[dict[str, Any]]:
        """Begin a session with the seed of the row."""
        result = await self._session({"seed": seed_of(sample), **self._arguments})
        text = self._text(result)
        if has_tools(self._schema):
            listed = await self._client.step({"type": "list_tools"})
            self.tools = [self._tool(tool) for tool in listed.observation["tools"]]
        elif self._action_field is None:
            text = f"{text}\n\n{described(self._schema)}"
        return opening(sample, text)

    async def step(self, reply: Reply) -> Step:
        """Take the action that the reply is."""
        if has_tools(self._schema):  # a reply that calls none is the last one
            return Step(reward=self._tool_reward, done=True)
        try:
            result = await self._client.step(action_of(reply.text, self._action_field))
        except ValueError as problem:
            return self._refusal(str(problem))
        except RuntimeError as error:
            if _code(error) != "VALIDATION_ERROR":
                raise EnvironmentFailure(f"the environment server failed: {reason(error)}") from error
            return self._refusal("The environment does not take this action.")
        return Step(None if result.done else self._text(result), result.reward, result.done)

    async def close(self) -> None:
        """End the session."""
        if self._client is not None:
            await self._client.disconnect()

    async def _session(self, arguments: Mapping[str, Any]) -> Any:
        """Connect and reset, and wait while the server has no free session."""
        from openenv.core.generic_client import GenericEnvClient

        end = asyncio.get_running_loop().time() + self._wait_s
        while True:
            self._client = GenericEnvClient(self._url)
            try:
                await self._client.connect()
                return await _begun(self._client, arguments)
            except RuntimeError as error:
                if _code(error) != "CAPACITY_REACHED":
                    raise
                if asyncio.get_running_loop().time() + RETRY_S > end:
                    raise EnvironmentFailure(
                        f"the environment server had no free session for {self._wait_s:g} s; start it with a "
                        f"larger max_concurrent_envs ({reason(error)})"
                    ) from None
            await self._client.disconnect()
            await asyncio.sleep(RETRY_S)

    def _refusal(self, problem: str) -> Step:
        self._refused += 1
        return Step(problem, info={"refused_actions": self._refused})

    def _text(self, result: Any) -> str:
        try:
            return text_of(result.observation, self._observation_field)
        except KeyError:
            raise EnvironmentFailure(
                f"observations have no field {self._observation_field!r}, only {', '.join(result.observation)}"
            ) from None

    def _tool(self, tool: Mapping[str, Any]) -> Tool:
        async def call(arguments: dict[str, Any]) -> str:
            if self._over:
                return "The episode has ended."
            action = {"type": "call_tool", "tool_name": tool["name"], "arguments": arguments}
            try:
                result = await self._client.step(action)
            except Exception as error:
                raise ToolFailure(f"the environment server failed: {reason(error)}") from error
            self._over = bool(result.done)
            self._tool_reward += result.reward or 0.0
            return _result_of(result.observation)

        return Tool(tool["name"], tool.get("description", ""), tool.get("input_schema") or {}, call)


async def _begun(client: Any, arguments: Mapping[str, Any]) -> Any:
    """Reset, and raise what the server says if it refuses the session.

    A server of 0.3.0 says that when it accepts the connection, and closes it: the request may fail before that is read.
    """
    from websockets.exceptions import ConnectionClosed

    try:
        return await client.reset(**arguments)
    except ConnectionClosed:
        answer = (await client._receive()).get("data", {})
        raise RuntimeError(f"Server error: {answer.get('message')} (code: {answer.get('code')})") from None


def _result_of(observation: Mapping[str, Any]) -> str:
    """Return the text of a tool's result, or of its error."""
    if observation.get("error"):
        return f"Error: {observation['error'].get('message')}"
    result = observation.get("result")
    if isinstance(result, Mapping) and "content" in result:  # of MCP
        return "\n".join(str(part.get("text", part)) for part in result["content"])
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _code(error: RuntimeError) -> str:
    """Return the code that the client of 0.3.0 writes at the end of its message."""
    return str(error).rpartition("(code: ")[2].removesuffix(")")


def openenv_environment(spec: EpisodeSpec) -> EpisodeRunner:
    """Return what runs episodes on an environment server.

    Raises:
        ConfigError: no server of OpenEnv answers, or its actions have no such field.
    """
    options = spec.options
    assert isinstance(options, OpenEnvSettings)
    schema = action_schema(options.url)
    fields = schema.get("properties", {})
    if options.action_field is not None and options.action_field not in fields:
        raise ConfigError(f"actions of {options.url} have no field {options.action_field!r}, only {', '.join(fields)}")
    return shipped_runner(
        spec,
        options,
        "rlcore_agents.openenv.environment:OpenEnvEnvironment",
        url=options.url.rstrip("/"),
        schema=schema,
        reset_arguments=options.reset,
        action_field=options.action_field,
        observation_field=options.observation_field,
        wait_s=0.8 * options.turn_timeout_s,
    )


def action_schema(url: str) -> dict[str, Any]:
    """Ask a server for the JSON schema of its actions.

    Raises:
        ConfigError: no server of OpenEnv answers.
    """
    import httpx

    try:
        response = httpx.get(f"{url.rstrip('/')}/schema", timeout=SCHEMA_TIMEOUT_S)
        response.raise_for_status()
        schema = response.json()["action"]
        schema["properties"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"no environment server of OpenEnv answers at {url}: {reason(error)}") from error
    return dict(schema)
