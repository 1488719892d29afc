"""`Reward`: a number for one sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REWARD_INTERFACE = 1


@dataclass(frozen=True)
class RewardSample:
    """What a reward sees.

    Attributes:
        prompt: the chat messages, or one user message for plain-text data.
        completion: the generated text without special tokens.
        ground_truth: as in the data file (None if it has none).
        data_source: names the data set the sample came from.
        extra: the data file's remaining fields.
        finish_reason: see `rlcore.engines.rollout.Completion`.
    """

    prompt: list[dict[str, Any]]
    completion: str
    ground_truth: Any = None
    data_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str = "stop"


@dataclass(frozen=True)
class RewardResult:
    """``score`` is finite; ``extras`` are further numbers to log and to aggregate in validation.

    ``answer`` is what was read from the completion, in a form in which equal answers are equal strings; validation
    votes with it (maj@N). None if the reward reads no answer.
    """

    score: float
    extras: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None


class Reward(ABC):
    """Scores samples. Implementations are called from one event loop and may run many calls at once."""

    @abstractmethod
    async def score(self, sample: RewardSample) -> RewardResult:
        """The sample's reward. What goes wrong inside costs this sample its score, never the run."""

    def close(self) -> None:
        """Release resources (worker processes …); idempotent."""
        return
