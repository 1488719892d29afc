"""Configurations of tasks that learn from a data set, without rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from rlcore.algorithms.objectives import SFTObjectiveSettings
from rlcore.algorithms.reward_models import RewardObjective, RewardObjectiveSettings
from rlcore.config import Config, ForeignKey
from rlcore.engines import ModelSettings, OptimSettings
from rlcore.engines.settings import Head
from rlcore_recipes.data.settings import RewardDataSettings, SampleDataSettings, SFTDataSettings
from rlcore_recipes.foreign.answers import foreign_keys, foreign_reward_keys
from rlcore_recipes.settings.controller import ControllerSettings, unused
from rlcore_recipes.settings.roles import ModelRole, RefSettings, RewardRole, ValidationRollout
from rlcore_recipes.settings.trainer import TrainerSettings


class SampleActorSettings(ModelRole):
    """The model under training. One step is one optimizer step over one batch."""

    optim: OptimSettings = Field(default_factory=lambda: OptimSettings(lr=1e-5), description="Optimizer and schedule.")


class SampleTaskConfig(Config):
    """One run of a task that learns from a data set.

    Attributes:
        head: of the model under training.
    """

    head: ClassVar[Head] = "policy"

    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the data order.")
    model: ModelSettings = Field(description="The model to train.")
    data: SampleDataSettings = Field(description="Samples to learn; train_batch_size counts samples.")
    actor: SampleActorSettings = Field(default_factory=SampleActorSettings, description="The model under training.")
    trainer: TrainerSettings = Field(description="Length, validation, checkpoints, tracking.")
    controller: ControllerSettings = Field(
        default_factory=ControllerSettings, description="Executor that runs the engines."
    )

    @classmethod
    def foreign_keys(cls, name: str) -> Iterator[ForeignKey]:
        """Yield what verl, TRL and OpenRLHF mean by ``name``."""
        return foreign_keys(name, supervised=True)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.trainer.test_freq > 0 and not self.data.val_files:
            yield "trainer.test_freq", f"is {self.trainer.test_freq}, but data.val_files is empty"
        if self.trainer.log_val_generations and not self.generates:
            yield "trainer.log_val_generations", "this recipe generates nothing to validate; set it to 0"
        if self.trainer.log_rollouts:
            yield "trainer.log_rollouts", "this recipe has no rollouts; set it to 0"
        yield from unused(self.controller, self.roles)
        if self.ref_role is not None:
            yield from ((f"ref.{key}", why) for key, why in self.ref_role.unused(self.actor))

    @property
    def head_outputs(self) -> int:
        """Numbers per token of a score head."""
        return 1

    @property
    def ref_role(self) -> RefSettings | None:
        """The reference model; None if the task needs none."""
        return None

    @property
    def generates(self) -> bool:
        """Whether completions are generated in validation."""
        return False

    @property
    def builds_ref(self) -> bool:
        """Whether the reference is a second model, and not the model under training without its adapters."""
        return self.ref_role is not None and not self.ref_role.is_actor(self.actor)

    @property
    def roles(self) -> list[str]:
        """The roles that take part in the run."""
        return ["actor", *(["ref"] if self.builds_ref else []), "compute"]

    @property
    def arithmetic(self) -> list[tuple[str, str, str]]:
        """Rows for `rlcore plan` about the sizes of a step: subject, how it is counted, number."""
        return [
            ("samples of a step", "data.train_batch_size, one optimizer step", str(self.data.train_batch_size)),
            ("steps", *self.trainer.length),
        ]


class SFTActorSettings(SampleActorSettings):
    """The model under training. One step is one optimizer step over one batch."""

    objective: SFTObjectiveSettings = Field(default_factory=SFTObjectiveSettings, description="Loss.")


class SFTConfig(SampleTaskConfig):
    """One run of supervised fine-tuning."""

    data: SFTDataSettings = Field(description="Samples to learn; train_batch_size counts samples.")
    actor: SFTActorSettings = Field(default_factory=SFTActorSettings, description="The model under training.")
    rollout: ValidationRollout = Field(
        default_factory=ValidationRollout,
        description="Generation in validation, if there is a reward or trainer.log_val_generations is not 0.",
    )
    reward: RewardRole | None = Field(
        None, description="Reward of completions in validation; null compares them with the reference answers."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        wanted = {"reward": self.reward is not None, "rollout": self.rollout != ValidationRollout()}
        if not self.generates:
            missing = "trainer.test_freq" if self.trainer.test_freq <= 0 else "trainer.log_val_generations"
            yield from (
                (key, f"has no effect without {missing}: nothing is generated") for key in wanted if wanted[key]
            )

    @property
    def generates(self) -> bool:
        """Whether completions are generated in validation."""
        return self.trainer.test_freq > 0 and (self.reward is not None or self.trainer.log_val_generations > 0)

    @property
    def roles(self) -> list[str]:
        """The roles that take part in the run."""
        return [*super().roles, *(["rollout", "reward"] if self.generates else [])]


class RewardActorSettings(SampleActorSettings):
    """The reward model under training. One step is one optimizer step over one batch."""

    objective: RewardObjectiveSettings = Field(default_factory=RewardObjectiveSettings, description="Loss.")


class RewardModelConfig(SampleTaskConfig):
    """One run of reward-model training."""

    head: ClassVar[Head] = "score"

    model: ModelSettings = Field(
        description="The model to train: a language model, which gets a new score head, or a reward model."
    )
    data: RewardDataSettings = Field(description="Samples to learn; train_batch_size counts pairs.")
    actor: RewardActorSettings = Field(default_factory=RewardActorSettings, description="The reward model.")

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        loss = self.actor.objective.loss
        if self.head_outputs > 1 and "labels" not in loss.entry.required_columns:
            yield (
                "data.label_key",
                f"names {self.head_outputs} columns of labels, and {loss.name} learns from pairs; take mse or bce",
            )

    @property
    def head_outputs(self) -> int:
        return len(self.data.label_key)

    @property
    def objective(self) -> RewardObjective:
        """The loss of scores."""
        return RewardObjective(self.actor.objective, tuple(self.data.label_key) if self.head_outputs > 1 else ())

    @classmethod
    def foreign_keys(cls, name: str) -> Iterator[ForeignKey]:
        """Yield what TRL and OpenRLHF mean by ``name``."""
        return foreign_reward_keys(name)


class TokenizeConfig(Config):
    """What `rlcore data tokenize` reads."""

    model: ModelSettings = Field(description="The model whose tokenizer is used.")
    data: SFTDataSettings = Field(description="Samples to tokenise.")
