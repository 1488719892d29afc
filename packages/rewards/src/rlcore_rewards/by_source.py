"""`data_source`: another reward for each data set, by the name that a sample has for its data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from pydantic import Field

from rlcore import plugins
from rlcore.config import Config, PluginSections
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore.engines.settings import RewardSettings
from rlcore_rewards.tally import Tally

_BOXED: dict[str, Any] = {"name": "math", "math": {"extraction": "boxed"}}
_RIGHT_OR_WRONG: dict[str, Any] = {"name": "math", "weight": 2.0, "offset": -1.0}  # 1 if right, else -1

BY_SOURCE: dict[str, dict[str, Any]] = {
    "openai/gsm8k": {"name": "gsm8k"},
    "gsm8k": {"name": "gsm8k"},
    "lighteval/MATH": _BOXED,
    "DigitalLearningGmbH/MATH-lighteval": _BOXED,
    "HuggingFaceH4/MATH-500": _BOXED,
    "math_dapo": _RIGHT_OR_WRONG,
    "math_dapo_reasoning": _RIGHT_OR_WRONG,
    "math": _RIGHT_OR_WRONG,
    "aime*": _RIGHT_OR_WRONG,
}
"""The data sets that are scored without configuration; verl scores them alike, with another comparison of answers."""


class SourceReward(PluginSections):
    """The reward of one data set. Its options are in a section of its name, such as ``function``."""

    plugin_group: ClassVar[str] = "rlcore.rewards"
    plugin_field: ClassVar[str] = "name"

    name: str = Field(description="Reward (`rlcore plugins` lists the installed ones).")
    weight: float = Field(1.0, description="Factor of the reward's score.")
    offset: float = Field(0.0, description="Added to the weighted score.")


class BySourceOptions(Config):
    """Options of `data_source`."""

    rewards: dict[str, SourceReward] = Field(
        default_factory=lambda: {name: SourceReward(**reward) for name, reward in BY_SOURCE.items()},
        description="Rewards by data source; a * in a name matches any characters. Default: gsm8k for GSM8K, math for "
        f"{', '.join(name for name, reward in BY_SOURCE.items() if reward['name'] == 'math')}.",
    )


class BySourceReward(Reward):
    """Scores every sample by the reward of its data source: ``weight`` · score + ``offset``.

    A sample of an unknown data source fails as ``data_source``. Extras and answers are those of the data source's
    reward. A failed sample keeps its error score.
    """

    def __init__(self, options: BySourceOptions, settings: RewardSettings) -> None:
        self._options, self._settings = options, settings
        self._tally = Tally("data_source", settings.error_score)
        self._built: dict[str, Reward] = {}  # built for the first sample: some start processes

    async def score(self, sample: RewardSample) -> RewardResult:
        name = self._pattern(sample.data_source)
        if name is None:
            known = ", ".join(self._options.rewards)
            return self._tally.failed(
                "data_source",
                f"no reward for the data source {sample.data_source[:100]!r}; known are {known}; name one in "
                "reward.data_source.rewards, or give a function (reward.path)",
            )
        part = self._options.rewards[name]
        if name not in self._built:
            self._built[name] = plugins.get("rlcore.rewards", part.name).build(part.options, self._settings)
        result: RewardResult = await self._built[name].score(sample)
        return (
            result
            if result.error or not result.applicable
            else replace(result, score=part.weight * result.score + part.offset)
        )

    def _pattern(self, source: str) -> str | None:
        rewards = self._options.rewards
        return source if source in rewards else next((name for name in rewards if fnmatchcase(source, name)), None)

    def stats(self) -> dict[str, int]:
        """Return the sums over the rewards of all data sources, and samples of unknown ones."""
        total = Counter(self._tally.stats())
        for reward in self._built.values():
            total.update(reward.stats())
        return dict(total)

    def close(self) -> None:
        for reward in self._built.values():
            reward.close()
