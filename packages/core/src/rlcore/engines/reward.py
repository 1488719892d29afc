"""`Reward`: a number for one sample."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlcore import event_loop
from rlcore.progress import report

REWARD_INTERFACE = 1


@dataclass(frozen=True)
class RewardSample:
    """What a reward sees.

    Attributes:
        prompt: the chat messages, or one user message for plain-text data.
        completion: the generated text, without special tokens or, on request, without the token that ended it alone.
        ground_truth: as in the data file (None if it has none).
        data_source: names the data set the sample came from.
        extra: the data file's remaining fields.
        finish_reason: see `rlcore.engines.rollout.Completion`.
        completion_tokens: the generated token ids, the token that ended the completion included.
        prompt_text: the prompt, if it is plain text without a chat template; else None.
        transcript: the conversation of an environment's episode as OpenAI messages, with calls of tools and their
            results; empty for a single completion.
        episode_score: the score that the episode itself gives; None without one. Rewards of turns are no part of it.
    """

    prompt: list[dict[str, Any]]
    completion: str
    ground_truth: Any = None
    data_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str = "stop"
    completion_tokens: Sequence[int] = ()
    prompt_text: str | None = None
    transcript: Sequence[Mapping[str, Any]] = ()
    episode_score: float | None = None


@dataclass(frozen=True)
class RewardResult:
    """``score`` is finite (as fp32); ``extras`` are further numbers to log and to aggregate in validation.

    ``answer`` is what was read from the completion, in a form in which equal answers are equal strings; validation
    votes with it (maj@N). None if the reward reads no answer. ``error`` names the kind of failure ("timeout",
    "exception" …) if ``score`` is only the configured score of failed samples; such a result may lack extras.
    ``applicable`` is false if the reward does not judge such samples; ``score`` is 0 then.
    """

    score: float
    extras: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None
    error: str | None = None
    applicable: bool = True


RESERVED_EXTRAS = frozenset(
    {"error_ratio", "equal_score_groups", "single_sample_groups", "overlong_punishment", "reward_model_score"}
)
"""Names that metrics of ours have where extras are logged."""

MAX_EXTRAS = 1000
LARGEST_SCORE = 3.4028234663852886e38
"""The largest fp32 number; scores are fp32 in a batch."""


def result_problem(result: RewardResult) -> str | None:
    """Return why ``result`` cannot be used, as the end of a sentence; None if it can."""
    if not abs(result.score) <= LARGEST_SCORE:  # NaN too
        return f"the score {result.score:g}, which is not finite as a 32-bit float"
    if len(result.extras) > MAX_EXTRAS:
        return f"{len(result.extras)} numbers in addition to the score, more than {MAX_EXTRAS}; each is a metric"
    for name, value in result.extras.items():
        if name in RESERVED_EXTRAS:
            return f"a number under the key {name!r}, which is the name of a metric of rlcore; choose another key"
        if not name.strip() or not name.isprintable() or len(name) > 200:
            return f"a number under the key {name[:50]!r}, which cannot name a metric"
        if not math.isfinite(value):
            return f"{value} under the key {name!r}, not a finite number"
    return None


class Reward(ABC):
    """Scores samples. Many calls are outstanding at a time, from successive event loops of several threads."""

    @abstractmethod
    async def score(self, sample: RewardSample) -> RewardResult:
        """Return the sample's reward. A failure costs this sample its score; it does not end the run."""

    def score_batch(self, samples: Sequence[RewardSample], concurrency: int = 256) -> list[RewardResult]:
        """Score all samples, at most ``concurrency`` at a time, and return the results in their order."""

        async def gather() -> list[RewardResult]:
            slots, done = asyncio.Semaphore(concurrency), 0

            async def one(sample: RewardSample) -> RewardResult:
                nonlocal done
                async with slots:
                    result = await self.score(sample)
                done += 1
                report("completions scored", done, len(samples))
                return result

            return await asyncio.gather(*map(one, samples))

        return event_loop.run(gather())

    def stats(self) -> dict[str, int]:
        """Return counts since construction: ``samples``, ``errors``, and ``errors/<kind>`` for each kind so far."""
        return {}

    def close(self) -> None:
        """Release resources (worker processes …); idempotent."""
        return
