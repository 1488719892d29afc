"""`command`: episodes of an agent program that knows nothing of rlcore but a base URL and an API key."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import ValidationError

from rlcore.boundary import reason
from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample, Segment, Trajectory
from rlcore.engines.rollout import RolloutEngine
from rlcore.errors import ConfigError
from rlcore.regular_file import read_regular
from rlcore_agents.conversation import TokenTree, chat_format
from rlcore_agents.endpoint import Endpoint
from rlcore_agents.environment.loading import load_callable
from rlcore_agents.gateway.episode_session import EpisodeSession
from rlcore_agents.gateway.gateway import gateway
from rlcore_agents.gateway.program import MARK, AgentFailure, environment, excerpt, resolved, run_program
from rlcore_agents.gateway.settings import CommandSettings, ProgramResult, words
from rlcore_kit.model_folder.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

MODEL = "policy"
"""Name of the policy in requests."""
LARGEST_RESULT = 1 << 20

Agent = Callable[[EpisodeSession, Mapping[str, Any], float], Awaitable[ProgramResult]]
"""Runs the agent of an episode: ``(session, sample, timeout_s)``; raises `AgentFailure`."""


class CommandEnvironment(EpisodeRunner):
    """Runs episodes of an agent program or function.

    Raises:
        ConfigError: the program or function does not exist.
    """

    def __init__(self, spec: EpisodeSpec) -> None:
        options = spec.options
        assert isinstance(options, CommandSettings)
        self._spec, self._options = spec, options
        self._agent: Agent = _function(options.function) if options.function else _program(options)
        self._chat = chat_format(spec)
        self._tokenizer = load_tokenizer(spec.model)
        self._gateway: Endpoint | None = None
        self._opening = Lock()

    async def run(self, engine: RolloutEngine, sample: PromptSample, seed: int) -> Trajectory:
        with self._opening:
            if self._gateway is None:
                self._gateway = gateway()
        session = self._session(engine, self._gateway, sample, seed)
        result: ProgramResult | AgentFailure
        with self._gateway.serving(session):
            try:
                result = await self._agent(session, self._sample(sample, seed), self._spec.limits.timeout_s)
            except AgentFailure as failure:
                result = failure
        await session.settled()
        if session.failure is not None:
            raise session.failure
        trajectory = self._trajectory(session, self._gateway, result)
        if not session.tree.turns:
            return replace(trajectory, segments=(Segment(sample.prompt_tokens),), finish_reason="abort")
        return trajectory

    def close(self) -> None:
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None

    def _session(self, engine: RolloutEngine, server: Endpoint, sample: PromptSample, seed: int) -> EpisodeSession:
        limits = self._spec.limits
        identity = server.identity(f"{sample.position}-{seed}")
        return EpisodeSession(
            engine=engine,
            url=f"{server.url}/sessions/{identity}",
            id=identity,
            model=MODEL,
            max_model_len=limits.max_model_len,
            sampling=self._spec.sampling,
            seed=seed,
            tree=TokenTree(self._chat, limits),
            limits=limits,
            tokenizer=self._tokenizer,
            models=self._options.models,
        )

    def _sample(self, sample: PromptSample, seed: int) -> dict[str, Any]:
        return {
            "messages": sample.messages,
            "ground_truth": sample.ground_truth,
            "data_source": sample.data_source,
            "extra": dict(sample.extra),
            "index": sample.index,
            "seed": seed,
            "purpose": self._spec.purpose,
            "model": MODEL,
        }

    def _trajectory(
        self, session: EpisodeSession, server: Endpoint, result: ProgramResult | AgentFailure
    ) -> Trajectory:
        truncated = session.limited > 0 and session.tree.turns > 0
        if isinstance(result, AgentFailure) and truncated and self._options.truncated_score is not None:
            result = ProgramResult(score=self._options.truncated_score)
        elif not isinstance(result, AgentFailure) and not session.tree.turns:
            result = AgentFailure(
                "the program ended without a reply of the policy: its client must use the base URL in OPENAI_BASE_URL "
                "or ANTHROPIC_BASE_URL, and the API key in OPENAI_API_KEY or ANTHROPIC_API_KEY"
            )
        invalid = _sentence(result, session.refusal) if isinstance(result, AgentFailure) else ""
        given = ProgramResult() if isinstance(result, AgentFailure) else result
        if given.score is None and not invalid:
            _note_missing_score()
        metrics = {
            "truncated": float(truncated),
            "requests": float(session.requests),
            "refused_requests": float(session.refused),
            "ignored_parameters": float(session.ignored.total()),
            "stray_requests": float(server.take_strays()),
        }
        trajectory = session.tree.trajectory(given.score, invalid, given.info, metrics)
        return replace(trajectory, finish_reason="length") if truncated else trajectory


def _sentence(failure: AgentFailure, refusal: str) -> str:
    """Return why an episode is invalid. Without the episode's id: sentences that are equal are counted together."""
    parts = [str(failure)]
    if refusal:
        parts.append(f"The request that was refused last: {refusal}")
    if failure.output is not None:
        parts.append(excerpt(failure.output))
    return ". ".join(parts)


def _program(options: CommandSettings) -> Agent:
    """Return the agent that is the program of ``options.command``."""
    assert options.command is not None
    command = resolved(words(options.command))

    async def run(session: EpisodeSession, sample: Mapping[str, Any], timeout_s: float) -> ProgramResult:
        with ExitStack() as stack:
            files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlcore-episode-")))
            given, result, work = files / "sample.json", files / "result.json", files / "work"
            work.mkdir()
            given.write_text(json.dumps(sample, default=_plain))
            variables = {
                "OPENAI_BASE_URL": f"{session.url}/v1",
                "OPENAI_API_KEY": session.key,
                "ANTHROPIC_BASE_URL": session.url,
                "ANTHROPIC_API_KEY": session.key,
                "RLCORE_MODEL": session.model,
                "RLCORE_SAMPLE": str(given),
                "RLCORE_RESULT": str(result),
                MARK: session.id,
            }
            folder = options.folder or work
            added = environment(options.pass_env, variables)
            await run_program(command, added, Path(folder), timeout_s, options.max_output_kb << 10)
            return _result(result)

    return run


def _result(file: Path) -> ProgramResult:
    """Read what the program wrote; nothing is written without a score of the program."""
    if not file.exists():
        return ProgramResult()
    try:
        return ProgramResult.model_validate_json(read_regular(file, LARGEST_RESULT))
    except (OSError, ValidationError) as error:
        raise AgentFailure(
            f'the program wrote no {{"score": …, "info": {{…}}}} to RLCORE_RESULT: {_why(error)}'
        ) from None


def _function(path: str) -> Agent:
    """Return the agent that is an async function."""
    name, function = path.rpartition(":")[2], load_callable(path, "agent function")
    if not inspect.iscoroutinefunction(function):
        raise ConfigError(f"agent function {path!r} is no async function (rollout.environment.command.function)")

    async def run(session: EpisodeSession, sample: Mapping[str, Any], timeout_s: float) -> ProgramResult:
        try:
            async with asyncio.timeout(timeout_s):
                given = await function(f"{session.url}/v1", session.key, sample)
        except TimeoutError as error:
            raise AgentFailure(f"{name} took longer than {timeout_s:g} s (rollout.environment.timeout_s)") from error
        except Exception as error:
            raise AgentFailure(f"{name} failed: {reason(error)}") from error
        try:
            return ProgramResult.model_validate(given if isinstance(given, dict) else {"score": given})
        except ValidationError as error:
            raise AgentFailure(
                f'{name} returned neither a score nor {{"score": …, "info": {{…}}}}: {_why(error)}'
            ) from None

    return run


def _why(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def _plain(value: Any) -> Any:
    """Return a value of a data file that JSON does not know, such as an array or a date, as one that it knows."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


@cache
def _note_missing_score() -> None:
    logger.warning(
        "the agent program wrote no score to RLCORE_RESULT: with the reward 'environment' its episodes count as 0"
    )
