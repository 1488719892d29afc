"""`python`: episodes whose environment is a class or a function of the user."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import Any, Literal

from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample, Segment, Trajectory
from rlcore.engines.rollout import RolloutEngine
from rlcore.errors import DataError
from rlcore_agents.conversation import ChatFormat, Reply, TokenTree, chat_format
from rlcore_agents.environment.exchange import EnvironmentFailure, Outcome, Request
from rlcore_agents.environment.loading import load_program
from rlcore_agents.environment.local import LocalHost, LocalSession
from rlcore_agents.environment.processes import ProcessHost, ProcessSession
from rlcore_agents.environment.settings import PythonEnvironmentSettings

LAST_S = 2.0
"""Seconds that an environment has after the end of its episode's time, to close."""


def python_environment(spec: EpisodeSpec) -> ProgramRunner:
    """Return the runner of the class or function that the settings name.

    Raises:
        ConfigError: it cannot be loaded or called.
    """
    options = spec.options
    assert isinstance(options, PythonEnvironmentSettings)
    host = ProcessHost(options) if options.processes else LocalHost(load_program(options))
    return ProgramRunner(spec, host, options.turn_timeout_s)


class ProgramRunner(EpisodeRunner):
    """Runs episodes of one `Environment`, or of a function.

    Args:
        host: where the environment's code runs: next to the rollout, or in processes.
    """

    def __init__(self, spec: EpisodeSpec, host: LocalHost | ProcessHost, turn_timeout_s: float) -> None:
        self._spec = spec
        self._timeout_s = turn_timeout_s
        self._chat = chat_format(spec)
        self._host: Any = host  # sessions of one kind go with the host of that kind

    def slot(self) -> AbstractAsyncContextManager[None]:
        slot: AbstractAsyncContextManager[None] = self._host.slot()
        return slot

    async def run(self, engine: RolloutEngine, sample: PromptSample, seed: int) -> Trajectory:
        session = await self._host.open(sample, seed)
        episode = Episode(self._spec, self._chat, engine, sample, seed)
        try:
            outcome = await self._converse(session, episode)
        except EnvironmentFailure as failure:
            await self._host.stop(session)
            outcome = Outcome(error=str(failure))
        except BaseException:
            session.cancel()
            raise
        return episode.trajectory(outcome)

    async def _converse(self, session: LocalSession | ProcessSession, episode: Episode) -> Outcome:
        reply = None
        while True:
            start = time.monotonic()
            seconds, limit = self._allowed(episode)
            message = await session.exchange(reply, seconds, limit)
            episode.environment_seconds += time.monotonic() - start
            if isinstance(message, Outcome):
                return message
            reply = await episode.reply(message)

    def _allowed(self, episode: Episode) -> tuple[float, str]:
        """Return the seconds that the environment may take now, and the setting that says so."""
        left = episode.seconds_left() + LAST_S
        if left < self._timeout_s:
            return left, f"timeout_s={self._spec.limits.timeout_s:g} of the episode allows"
        return self._timeout_s, f"turn_timeout_s={self._timeout_s:g}"

    def close(self) -> None:
        self._host.close()


class Episode:
    """The policy's side of one episode: replies within the limits, and the trajectory.

    Attributes:
        environment_seconds: seconds that the environment took.
    """

    def __init__(
        self, spec: EpisodeSpec, chat: ChatFormat, engine: RolloutEngine, sample: PromptSample, seed: int
    ) -> None:
        self._spec = spec
        self._tree = TokenTree(chat, spec.limits)
        self._engine = engine
        self._sample = sample
        self._seed = seed
        self._end = time.monotonic() + spec.limits.timeout_s
        self._replies: list[Reply] = []
        self._cut: Literal["", "length", "abort"] = ""
        self.environment_seconds = 0.0

    def seconds_left(self) -> float:
        """Return the rest of the episode's time."""
        return self._end - time.monotonic()

    async def reply(self, request: Request) -> Reply | None:
        """Return the policy's reply; None if a limit of the episode leaves no room for one.

        Raises:
            EnvironmentFailure: the conversation cannot be written in the model's chat format, or is too long to begin.
        """
        try:
            turn = self._tree.prompt(request.messages, request.tools)
        except DataError as error:
            raise EnvironmentFailure(f"its conversation cannot be shown to the policy: {error}") from None
        number, seconds = len(self._replies), self.seconds_left()
        if turn.room < 1 and not number:
            raise EnvironmentFailure(
                f"its first prompt has {len(turn.tokens)} tokens, schemas of tools included, which leave no room for a "
                "reply; raise data.max_prompt_length"
            )
        completion = None
        if turn.room >= 1 and number < self._spec.limits.max_turns and seconds > 0 and not self._cut:
            name = f"{self._sample.position}-{self._seed}-{number}"
            wanted = turn.request(self._spec.sampling, _turn_seed(self._seed, number), name)
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    completion = await self._engine.generate(wanted)
        if completion is None:
            self._cut = self._cut or "length"
            return None
        self._replies.append(self._tree.add(turn, completion, self._spec.sampling.logprobs, request.state))
        if completion.finish_reason == "abort":
            self._cut = "abort"
            return None
        return self._replies[-1]

    def trajectory(self, outcome: Outcome) -> Trajectory:
        """Return the episode with the rewards of ``outcome``."""
        invalid = outcome.error
        if not invalid and not self._replies:
            invalid = "it ended before the policy replied"
        metrics = {
            "truncated": float(bool(self._cut)),
            "environment_seconds": self.environment_seconds,
            **outcome.metrics,
            **_numbers(outcome.info),
        }
        if not self._replies:
            return Trajectory((Segment(self._sample.prompt_tokens),), "abort", invalid=invalid, metrics=metrics)
        for number, reward in outcome.rewards:
            self._tree.reward(self._replies[number], reward)
        trajectory = self._tree.trajectory(outcome.score, invalid, outcome.info, metrics)
        return replace(trajectory, finish_reason=self._cut) if self._cut else trajectory


def _turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn's sampling; seeds of the first turns are those of single completions."""
    return random.Random(f"{seed} turn {turn}").getrandbits(63) if turn else seed


def _numbers(info: Mapping[str, object]) -> dict[str, float]:
    return {f"env/{key}": float(value) for key, value in info.items() if isinstance(value, int | float)}
