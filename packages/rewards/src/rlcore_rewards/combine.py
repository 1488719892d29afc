"""`combine`: the weighted sum of several rewards."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import ClassVar

from pydantic import Field, field_validator

from rlcore import plugins
from rlcore.config import Config, PluginSections
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings


class Part(PluginSections):
    """One of the rewards. Its options are in a section of its name, such as ``function``."""

    plugin_group: ClassVar[str] = "rlcore.rewards"
    plugin_field: ClassVar[str] = "name"

    name: str = Field(description="Reward (`rlcore plugins` lists the installed ones).")
    weight: float = Field(1.0, description="Factor of the reward's score in the sum.")
    label: str = Field("", description="Name of the score in metrics; the reward's name when empty.")


class CombineOptions(Config):
    """Options of `combine`."""

    rewards: tuple[Part, ...] = Field(min_length=1, description="The rewards and their weights.")

    @property
    def needs_ground_truth(self) -> bool:
        """Whether one of the rewards cannot do without a reference answer."""
        return any(getattr(part.options, "needs_ground_truth", False) for part in self.rewards)

    @field_validator("rewards")
    @classmethod
    def _labels_differ(cls, rewards: tuple[Part, ...]) -> tuple[Part, ...]:
        twice = [label for label, count in Counter(map(label_of, rewards)).items() if count > 1]
        if twice:
            raise ValueError(
                f"several rewards have the label {', '.join(map(repr, twice))}; give each a different label"
            )
        return rewards


def label_of(part: Part) -> str:
    """Return the label of ``part``, which is its name if it has none."""
    return part.label or part.name


class CombinedReward(Reward):
    """The reward Σ weight·score over its parts.

    Extras are each part's score as ``<label>/score`` and its extras as ``<label>/…``. A part that fails on a sample
    contributes its error score; the result names the first such failure. A part that is not applicable to a sample
    contributes nothing. The answer is that of the first part that reads one.
    """

    def __init__(self, options: CombineOptions, settings: RewardSettings) -> None:
        self._parts: dict[str, tuple[float, Reward]] = {}
        try:
            for part in options.rewards:
                reward = plugins.get("rlcore.rewards", part.name).build(part.options, settings)
                self._parts[label_of(part)] = (part.weight, reward)
        except BaseException:
            self.close()
            raise

    async def score(self, sample: RewardSample) -> RewardResult:
        results = await asyncio.gather(*(reward.score(sample) for _, reward in self._parts.values()))
        total = 0.0
        extras: dict[str, float] = {}
        for (label, (weight, _)), result in zip(self._parts.items(), results):
            if result.applicable:  # else its score is not among those of the mean
                total += weight * result.score
                extras[f"{label}/score"] = result.score
            extras |= {f"{label}/{name}": value for name, value in result.extras.items()}
        answer = next((result.answer for result in results if result.answer is not None), None)
        error = next((result.error for result in results if result.error is not None), None)
        return RewardResult(total, extras, answer, error, any(result.applicable for result in results))

    def stats(self) -> dict[str, int]:
        """Return the sums over the parts: a sample counts once in each part."""
        total: Counter[str] = Counter({"samples": 0, "errors": 0})
        for _, reward in self._parts.values():
            total.update(reward.stats())
        return dict(total)

    def close(self) -> None:
        for _, reward in self._parts.values():
            reward.close()
