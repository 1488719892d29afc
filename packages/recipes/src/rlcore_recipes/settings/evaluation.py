"""The configuration of an evaluation; its sections are those of a run of reinforcement learning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, model_validator

from rlcore.config import Config, FileName
from rlcore.engines import ModelSettings
from rlcore.engines.settings import wants_adapters
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.settings.controller import ControllerSettings, unused
from rlcore_recipes.settings.environment import with_environment_reward
from rlcore_recipes.settings.roles import RewardRole, RolloutSettings

OF_TRAINING = {
    "data": ("train_files", "train_batch_size", "shuffle", "weights"),
    "rollout": ("n", "temperature", "top_k", "top_p", "min_p"),
}
"""Keys that a run has in the sections ``data`` and ``rollout``, and an evaluation has not."""


def unused_keys(section: Config, name: str, instead: str) -> Iterator[tuple[str, str]]:
    """Yield the keys of training in ``section`` that have another value than their default."""
    for key in OF_TRAINING[name]:
        if getattr(section, key) != type(section).model_fields[key].get_default(call_default_factory=True):
            yield key, f"is for training; {instead}"


class EvalDataSettings(DataSettings):
    """Prompts to evaluate on."""

    train_files: list[FileName] = Field([], description="For training; an evaluation reads val_files.")
    val_files: list[FileName] = Field(min_length=1, description="Files to evaluate on, as a run's train_files.")
    val_batch_size: int = Field(
        256, ge=1, description="Prompts that are generated together. Their results are saved when all are scored."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from unused_keys(self, "data", "an evaluation reads val_files")
        yield from super().problems() if self.weights is None else ()


class EvalRolloutSettings(RolloutSettings):
    """Generation: the engine, and the section validation with the sampling."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from unused_keys(self, "rollout", "an evaluation samples as the section validation says")
        sampling = self.validation
        if sampling.n > 1 and sampling.temperature == 0:
            yield (
                "validation.temperature",
                f"is 0 (greedy): the n={sampling.n} completions of a prompt would be equal",
            )
        section = self.engine
        if getattr(self.options, "load_format", None) == "dummy":
            yield f"{section}.load_format", "is dummy, which reads no weights; set it to auto"
        if wants_adapters(self.options):
            yield f"{section}.enable_lora", "is for training; an evaluated model has merged weights"


class ReportSettings(Config):
    """What is computed from the scores."""

    k: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="k of pass@k and maj@k; empty: powers of 2 up to the completions per prompt, and their number."
    )
    pass_score: float = Field(1.0, description="A completion passes if its score is at least this.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Confidence level of the intervals.")


class EvalConfig(Config):
    """One evaluation of one or several models."""

    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of every completion.")
    model: ModelSettings = Field(description="The model to evaluate; a SOURCE is its path.")
    data: EvalDataSettings = Field(description="Prompts.")
    rollout: EvalRolloutSettings = Field(default_factory=EvalRolloutSettings, description="Generation.")
    reward: RewardRole = Field(
        description="Reward of completions. With rollout.environment its name may be left out: environment."
    )
    report: ReportSettings = Field(default_factory=ReportSettings, description="Metrics and their intervals.")
    controller: ControllerSettings = Field(
        default_factory=ControllerSettings, description="Executor that runs the engines."
    )

    @model_validator(mode="before")
    @classmethod
    def _reward_of_environment(cls, data: Any) -> Any:
        return with_environment_reward(cls, data)

    def problems(self) -> Iterator[tuple[str, str]]:
        n = self.rollout.validation.n
        for k in self.report.k:
            if k > n:
                yield "report.k", f"{k} completions are needed, and rollout.validation.n={n} are made per prompt"
        yield from unused(self.controller, self.roles)

    @property
    def roles(self) -> list[str]:
        """The roles that take part."""
        return ["rollout", "reward", "compute"]

    @property
    def ks(self) -> list[int]:
        """The k of pass@k and maj@k, in order."""
        n = self.rollout.validation.n
        return sorted(set(self.report.k)) or sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
