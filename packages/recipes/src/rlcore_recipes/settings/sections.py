"""The sections that every reinforcement-learning recipe's configuration has, and what follows from their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from rlcore.config import ForeignKey
from rlcore.engines import ModelSettings, SamplingParams, WeightSyncSettings
from rlcore.engines.settings import gives_logprobs
from rlcore_recipes.data.settings import DataSettings
from rlcore_recipes.foreign.answers import foreign_keys
from rlcore_recipes.settings.algorithm import AlgorithmSettings, DynamicSamplingSettings
from rlcore_recipes.settings.asynchronous import AsyncSection, AsyncSettings
from rlcore_recipes.settings.columns import EPISODES, ON_DEMAND, SAMPLED, SCORED, SHAPED
from rlcore_recipes.settings.controller import ControllerSettings
from rlcore_recipes.settings.environment import with_environment_reward
from rlcore_recipes.settings.roles import (
    ActorSettings,
    CriticSettings,
    FrozenRole,
    PRMSettings,
    RefSettings,
    RewardModelSettings,
    RewardRole,
    RolloutSettings,
)
from rlcore_recipes.settings.trainer import TrainerSettings

if TYPE_CHECKING:
    from rlcore_recipes.rollouts.episode import Episode


class RLSections(AsyncSection):
    """One run of reinforcement learning; `rlcore_recipes.settings.RLConfig` adds the rules that span its sections.

    Attributes:
        own_columns: names of the columns that the recipe's step adds to its batches, for advantage estimators and
            policy losses that need them.
    """

    own_columns: ClassVar[frozenset[str]] = frozenset()

    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of everything: data order, new heads, every completion.")
    model: ModelSettings = Field(description="The model to train.")
    data: DataSettings = Field(description="Prompts; train_batch_size counts prompts.")
    actor: ActorSettings = Field(default_factory=ActorSettings, description="The policy under training.")
    ref: RefSettings = Field(default_factory=RefSettings, description="The frozen reference policy.")
    rollout: RolloutSettings = Field(default_factory=RolloutSettings, description="Generation.")
    reward: RewardRole = Field(
        description="Reward of completions. With rollout.environment its name may be left out: environment."
    )
    reward_model: RewardModelSettings | None = Field(
        None, description="Model whose scores are added to the reward's; null: none."
    )
    algorithm: AlgorithmSettings = Field(
        default_factory=AlgorithmSettings, description="Advantages and reward shaping."
    )
    trainer: TrainerSettings = Field(description="Length, validation, checkpoints, tracking.")
    controller: ControllerSettings = Field(
        default_factory=ControllerSettings, description="Executor that runs the engines."
    )

    weight_sync: WeightSyncSettings = Field(
        default_factory=WeightSyncSettings,
        description="Weight sync from the actor to rollout engines in other processes.",
    )
    trace: bool = Field(
        False, description="Write what every process did, and when, to out_dir/trace.json (Chrome trace format)."
    )

    @model_validator(mode="before")
    @classmethod
    def _reward_of_environment(cls, data: Any) -> Any:
        return with_environment_reward(cls, data)

    @classmethod
    def foreign_keys(cls, name: str) -> Iterator[ForeignKey]:
        """Yield what verl, TRL and OpenRLHF mean by ``name``."""
        return foreign_keys(name)

    @property
    def asynchronous(self) -> AsyncSettings:
        """The section ``async``."""
        settings: AsyncSettings = getattr(self, "async")
        return settings

    @property
    def roles(self) -> list[str]:
        """The roles that take part in the run."""
        models = ["actor"] + ["critic"] * self.has_critic + ["ref"] * self.builds_ref
        models += ["reward_model"] * (self.reward_model is not None) + ["prm"] * (self.prm_role is not None)
        return [*models, *self.frozen_models, "rollout", "reward", "compute"]

    @property
    def arithmetic(self) -> list[tuple[str, str, str]]:
        """Rows for `rlcore plan` about the sizes of a step: subject, how it is counted, number."""
        data, n = self.data, self.rollout.n
        prompts, sizes = data.train_batch_size, [("actor", self.mini_batch_size, self.actor.epochs)]
        if self.has_critic:
            sizes.append(("critic", *self.critic_sizes))
        if self.prm_role is not None:
            sizes.append(("prm", *self.prm_sizes))
        rows = [("samples of a step", f"{prompts} prompts × {n} completions", f"{prompts * n}")]
        for role, size, epochs in sizes:
            rows += [
                (f"mini-batch of the {role}", f"{size} prompts × {n} completions", f"{size * n} samples"),
                (
                    f"optimizer steps of the {role} in a step",
                    f"{prompts} / {size} mini-batches × {epochs} epochs",
                    f"{prompts // size * epochs}",
                ),
            ]
        rows.append(
            (
                "longest sequence",
                f"{data.max_prompt_length} + {data.max_response_length} tokens; token budget of micro-batches: "
                f"{self.actor.max_tokens_per_micro_batch}",
                f"{data.longest_sequence} tokens",
            )
        )
        if (environment := self.rollout.environment) is not None:
            tokens = environment.turn_tokens or data.max_response_length
            how = f"rollout.environment.max_turns, each of at most {tokens} tokens"
            rows.append(("turns of an episode", how, f"{environment.max_turns}"))
        return [*rows, ("steps", *self.trainer.length)]

    @property
    def frozen_models(self) -> Mapping[str, FrozenRole]:
        """Further models in training engines that are never trained, by role. Recipes with such models override it."""
        return {}

    def training_episode(self, sampling: SamplingParams) -> Episode | None:
        """Return how a trajectory comes about; None: as a completion. Recipes with several turns override it.

        Args:
            sampling: of training; ``max_tokens`` bounds everything after the prompt.
        """
        return None

    @property
    def needs_scores(self) -> bool:
        """Whether nothing is learned without scores. Recipes that learn from something else override it."""
        return True

    @property
    def response_key(self) -> str | None:
        """The column of completions that are trained on next to sampled ones. Recipes that have them override it."""
        return None

    @property
    def sampled_fraction(self) -> float:
        """The share of prompts whose completions are sampled; the others have those of `response_key`."""
        return 1.0

    @property
    def given_first(self) -> bool:
        """Whether the first completion of every prompt is that of `response_key`, and the others are sampled."""
        return False

    @property
    def critic_role(self) -> CriticSettings | None:
        """Settings of the critic; None without one. Recipes with a critic override it."""
        return None

    @property
    def has_critic(self) -> bool:
        """Whether a critic takes part."""
        return self.critic_role is not None

    @property
    def critic_sizes(self) -> tuple[int, int]:
        """The critic's mini-batch in prompts, and its epochs."""
        critic = self.critic_role
        assert critic is not None
        return critic.mini_batch_size or self.mini_batch_size, critic.epochs or self.actor.epochs

    @property
    def prm_role(self) -> PRMSettings | None:
        """Settings of the process reward model; None without one. Recipes with one override it."""
        return None

    @property
    def prm_sizes(self) -> tuple[int, int]:
        """The process reward model's mini-batch in prompts, and its epochs."""
        prm = self.prm_role
        assert prm is not None
        return prm.mini_batch_size or self.mini_batch_size, prm.epochs

    @property
    def dynamic_sampling(self) -> DynamicSamplingSettings | None:
        """Settings of dynamic sampling; None if steps train on all groups. Recipes that offer it override it."""
        return None

    @property
    def needs_ref(self) -> bool:
        """Whether a reference policy takes part."""
        return (
            self.algorithm.kl_in_reward is not None
            or self.actor.objective.kl_loss.coeff > 0
            or "ref_logprobs" in self.needed_columns
        )

    @property
    def builds_ref(self) -> bool:
        """Whether the reference policy is a second model, and not the actor without its adapters."""
        return self.needs_ref and not self.ref.is_actor(self.actor)

    @property
    def rollout_logprobs_read_by(self) -> list[str]:
        """Settings, as ``key`` or ``key=value`` below ``actor``, that read the log-probs of the rollout engine."""
        uses = {
            "old_logprobs=rollout": self.actor.old_logprobs == "rollout",
            "objective.correction": self.actor.objective.correction is not None,
        }
        return [setting for setting, used in uses.items() if used]

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the log-probs of the sampling policy must be known before the update.

        They are not if the whole batch makes one optimizer step: until then the policy is still the one that sampled.
        """
        return (
            self.actor.old_logprobs == "rollout"
            or (self.updates_per_step > 1 and not self.imitates)
            or self.algorithm.kl_in_reward is not None
            or "old_logprobs" in self.needed_columns
        )

    @property
    def imitates(self) -> bool:
        """Whether the update is supervised learning of weighted samples, whatever policy they came from."""
        objective = self.actor.objective
        compares = "importance_ratio" in objective.policy_loss.entry.traits or objective.correction is not None
        return "imitates" in self.algorithm.advantage.entry.traits and not compares

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of the policy must be known before the update."""
        return "entropy" in self.algorithm.advantage.entry.required_columns

    @property
    def needed_columns(self) -> frozenset[str]:
        """The columns that the advantage estimator and the policy loss declare."""
        return self.algorithm.advantage.entry.required_columns | self.actor.objective.policy_loss.entry.required_columns

    @property
    def columns(self) -> frozenset[str]:
        """The columns that a batch can have before advantages are estimated."""
        sampled = SAMPLED if gives_logprobs(self.rollout.options) else SAMPLED - {"rollout_logprobs"}
        return (
            sampled
            | SCORED
            | ON_DEMAND
            | SHAPED
            | self.own_columns
            | ({"values"} if self.has_critic else frozenset())
            | self._of_reward_model
            | (frozenset() if self.rollout.environment is None else EPISODES)
        )

    @property
    def _of_reward_model(self) -> frozenset[str]:
        """The columns that a reward model adds."""
        if self.reward_model is None:
            return frozenset()
        steps = self.reward_model.steps
        found = {"reward_model_score"} | ({"steps"} if steps is not None else set())
        return frozenset(found | ({"step_rewards"} if steps is not None and steps.combine == "tokens" else set()))

    @property
    def mini_batch_size(self) -> int:
        """Prompts per optimizer step of the actor."""
        return self.actor.mini_batch_size or self.data.train_batch_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of the actor for one batch."""
        return self.data.train_batch_size // self.mini_batch_size * self.actor.epochs

    def scheduled_updates(self, steps: int) -> int:
        """Return the optimizer steps that the actor's schedule covers in a run of so many ``steps`` with an update."""
        return steps * self.updates_per_step
