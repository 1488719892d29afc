"""One episode on the side of the environment: its code is called here, in the rollout process or in a worker."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlcore.boundary import reason
from rlcore.engines.episode import PromptSample
from rlcore.errors import RlcoreError
from rlcore_agents.environment import checks
from rlcore_agents.environment.chat import BlockingChat, Chat, EpisodeTruncated
from rlcore_agents.environment.environment import Environment, Step
from rlcore_agents.environment.exchange import EnvironmentFailure, Outcome, Policy
from rlcore_agents.tools.thread import in_thread


@dataclass(frozen=True)
class Program:
    """What the user wrote.

    Attributes:
        name: for messages.
        code: a subclass of `Environment`, or a function of a chat and a sample.
        max_chars: longer messages are cut.
    """

    name: str
    code: Callable[..., Any]
    kwargs: Mapping[str, Any]
    max_chars: int


async def play(program: Program, policy: Policy, sample: PromptSample, seed: int) -> Outcome:
    """Play one episode; whatever the code of the environment does wrong is in `Outcome.error`."""
    chat = Chat(policy, sample, seed, program.max_chars)
    outcome = chat.outcome
    play_one = _play_environment if isinstance(program.code, type) else _play_function
    try:
        await play_one(program, chat, sample)
    except EpisodeTruncated:
        pass
    except (EnvironmentFailure, RlcoreError) as failure:
        outcome.error = str(failure)
    outcome.metrics |= chat.tool_use.metrics()
    if not outcome.error and chat.info:
        try:
            outcome.info = checks.info(chat.info, program.name)
        except EnvironmentFailure as failure:
            outcome.error = str(failure)
    if outcome.score is None and (outcome.rewards or chat.truncated):
        outcome.score = 0.0  # the episode has a score: what its turns got
    return outcome


async def _play_environment(program: Program, chat: Chat, sample: PromptSample) -> None:
    environment: Environment = await _guarded(f"{program.name}()", program.code, **program.kwargs)
    try:
        await _steps(program.name, environment, chat, sample)
    except BaseException:
        await _close(program.name, environment, failed=True)
        raise
    await _close(program.name, environment)


async def _steps(name: str, environment: Environment, chat: Chat, sample: PromptSample) -> None:
    opening = await _guarded(f"{name}.reset", environment.reset, sample, chat.seed)
    if opening is not None:
        chat.messages = chat.shortened(checks.messages(opening, f"{name}.reset"))
    step = Step()
    while not step.done:
        new = None if step.observation is None else checks.messages(step.observation, f"{name}.step")
        reply = await chat(new, environment.tools)
        step = checks.step(await _guarded(f"{name}.step", environment.step, reply), f"{name}.step")
        chat.info |= step.info
        chat.state = step.state
        if step.reward is not None:
            chat.reward(step.reward, reply)
    chat.outcome.score = step.score


async def _close(name: str, environment: Environment, failed: bool = False) -> None:
    try:
        await _guarded(f"{name}.close", environment.close)
    except EnvironmentFailure:
        if not failed:  # the first failure is the one to report
            raise


async def _play_function(program: Program, chat: Chat, sample: PromptSample) -> None:
    is_coroutine = inspect.iscoroutinefunction(program.code)
    given = chat if is_coroutine else BlockingChat(chat, asyncio.get_running_loop())
    result = await _guarded(program.name, program.code, given, sample, **program.kwargs)
    if result is not None:
        chat.outcome.score = checks.number(result, f"the score that {program.name} returned")


async def _guarded(where: str, function: Callable[..., Any], *arguments: Any, **kwargs: Any) -> Any:
    """Call the user's ``function``, a plain one in a thread; what it raises becomes an `EnvironmentFailure`."""
    try:
        if inspect.iscoroutinefunction(function):
            return await function(*arguments, **kwargs)
        result = await in_thread(lambda: function(*arguments, **kwargs))
        return await result if inspect.isawaitable(result) else result
    except (asyncio.CancelledError, EpisodeTruncated, EnvironmentFailure):
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise EnvironmentFailure(f"{where} raised {reason(error)}{place}") from error
