"""An environment for tests, installed as a package: it answers every turn with the same tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlcore.config import Config
from rlcore.engines import GenerationRequest, RolloutEngine
from rlcore.engines.episode import EpisodeRunner, EpisodeSpec, PromptSample, Segment, Trajectory, sampled_segment
from rlcore.plugins import Plugin

ANSWER = [5, 6, 7]


class Options(Config):
    turns: int = Field(2, description="Turns of an episode.")
    mistake: Literal["", "raises", "hangs", "no trajectory", "too long", "cannot be built"] = Field(
        "", description="What the runner does wrong."
    )
    invalid: list[int] = Field([], description="Positions of prompts whose episodes are invalid.")
    invalid_once: bool = Field(False, description="Only the first episode with a seed is.")
    broken_share: int = Field(0, description="One episode of so many is invalid, by its seed; 0: none.")
    branches: bool = Field(False, description="All turns but the first two branch off after the first.")
    turn_rewards: bool = Field(False, description="Turns have rewards.")
    log: Path | None = Field(None, description="File of a line for each event.")
    kills_at: int = Field(-1, description="The first episode of this prompt kills its process after a turn.")


class Scripted(EpisodeRunner):
    """The score is the share of even token ids among those sampled; a turn's reward is 1 if its last one is even."""

    def __init__(self, spec: EpisodeSpec) -> None:
        self.spec = spec
        self.options: Any = spec.options
        self.positions: set[int] = set()
        if self.options.mistake == "cannot be built":
            raise ValueError("no such game")

    def log(self, line: str) -> None:
        if self.options.log is not None:
            with self.options.log.open("a") as file:
                file.write(line + "\n")

    async def run(self, engine: RolloutEngine, sample: PromptSample, seed: int) -> Trajectory:
        self.log(f"begin {self.spec.purpose} {sample.position} {seed}")
        segments, messages = [Segment(sample.prompt_tokens)], list(sample.messages)
        for turn in range(self.options.turns):
            path = Trajectory(tuple(segments), "stop").rows()[-1]
            tokens = [token for index in path for token in segments[index].tokens]
            room = len(sample.prompt_tokens) + self.spec.limits.max_tokens - len(tokens)
            sampling = replace(self.spec.sampling, seed=seed + turn, max_tokens=min(2, room))
            completion = await engine.generate(GenerationRequest(tokens, sampling, f"{sample.position}-{seed}-{turn}"))
            made = sampled_segment(completion, sampling.logprobs)
            even = float(completion.tokens[-1] % 2 == 0) if self.options.turn_rewards else None
            segments.append(replace(made, reward=even, state=str(turn)))
            messages.append({"role": "assistant", "content": f"turn {turn}"})
            if turn == 0 and sample.position == self.options.kills_at:
                self._kill()
            if turn + 1 < self.options.turns:
                segments.append(Segment(ANSWER, parent=1 if self.options.branches else None))
                messages.append({"role": "tool", "tool_call_id": "1", "content": "the same"})
        await self._mistake()
        if self.options.mistake == "no trajectory":
            return "nothing"  # type: ignore[return-value]
        if self.options.mistake == "too long":
            segments.append(Segment(ANSWER * 100))
        sampled = [token for segment in segments if segment.sampled for token in segment.tokens]
        share = self.options.broken_share
        invalid = sample.position in self.options.invalid or (share > 0 and seed % share == 0)
        if self.options.invalid_once:
            invalid, _ = invalid and sample.position not in self.positions, self.positions.add(sample.position)
        self.log(f"end {self.spec.purpose} {sample.position} {seed}")
        return Trajectory(
            tuple(segments),
            completion.finish_reason,
            score=sum(token % 2 == 0 for token in sampled) / len(sampled),
            invalid="the game is broken" if invalid else "",
            messages=messages,
            metrics={"turns": self.options.turns, "tool_calls": self.options.turns - 1, "odd": sampled[-1] % 2},
        )

    def _kill(self) -> None:
        with suppress(FileExistsError):
            self.options.log.with_suffix(".killed").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)

    async def _mistake(self) -> None:
        if self.options.mistake == "raises":
            raise ValueError("no such move")
        if self.options.mistake == "hangs":
            await asyncio.sleep(3600)

    def close(self) -> None:
        self.log(f"close {self.spec.purpose}")


scripted = Plugin(interface=1, config="scripted_environment:Options", factory="scripted_environment:Scripted")
