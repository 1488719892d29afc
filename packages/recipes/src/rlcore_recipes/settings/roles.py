"""Settings of the roles that take part in a run: actor, critic, reference, rollout, reward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlcore.algorithms.objectives import PolicyObjectiveSettings, ValueObjectiveSettings
from rlcore.algorithms.off_policy import MISParams
from rlcore.config import Algorithm, Config, PluginSections, ShortForm
from rlcore.engines import ModelSettings, OptimSettings, RewardSettings
from rlcore.engines.settings import adapter_rank, without_adapters
from rlcore_recipes.settings.environment import EnvironmentRole

MOST_COMPLETIONS = 2**16

AUTO: Literal["auto"] = "auto"
DEFAULT_TOKENS = 16384
"""Largest token budget of a micro-batch that is chosen automatically; larger ones are not faster."""


class ModelRole(PluginSections):
    """A model in a training engine. The engine's own options stand in a section of its name, such as ``fsdp``."""

    plugin_group: ClassVar[str] = "rlcore.train_engines"

    engine: str = Field("fsdp", description="Training engine (`rlcore plugins` lists the installed ones).")
    max_tokens_per_micro_batch: Literal["auto"] | Annotated[int, Field(gt=0, lt=2**31)] = Field(
        AUTO,
        description="Token budget of a micro-batch; a longer sequence is a micro-batch alone. 'auto': what fits into "
        f"free memory, at most {DEFAULT_TOKENS}. Losses and gradients do not depend on it, up to rounding.",
    )
    offload: bool = Field(False, description="Move the model to host memory while it is not used.")


class FollowingRole(ModelRole):
    """A model in addition to the policy, in the policy's engine unless another one is named."""

    engine: str | None = Field(  # type: ignore[assignment]  # null names the actor's
        None,
        description="Training engine; null: the actor's, with the actor's options (but no adapters) unless a section "
        "of the engine's name is here.",
    )

    def engine_with(self, actor: ModelRole) -> tuple[str, Config]:
        """Return the engine's name and its options."""
        if self.engine is not None:
            return self.engine, self.options
        if actor.engine in (self.__pydantic_extra__ or {}):
            return actor.engine, self.options_of(actor.engine)
        return actor.engine, without_adapters(actor.options)


class PolicySettings(ModelRole):
    """The policy under training, whatever its loss."""

    optim: OptimSettings = Field(default_factory=OptimSettings, description="Optimizer and schedule.")
    mini_batch_size: int | None = Field(
        None, gt=0, description="Prompts per optimizer step (each with all its completions); null: the whole batch."
    )
    epochs: int = Field(1, ge=1, description="Passes over every batch (PPO epochs).")


class ActorSettings(PolicySettings):
    """The policy under training."""

    objective: PolicyObjectiveSettings = Field(
        default_factory=PolicyObjectiveSettings, description="Policy loss and regularisers."
    )
    old_logprobs: Literal["recompute", "rollout"] = Field(
        "recompute",
        description="Where the log-probs of the sampling policy come from. 'recompute' takes the training engine's and "
        "needs no extra pass when a batch makes one optimizer step; 'rollout' those reported by the rollout engine.",
    )
    drop_zero_advantage: bool | None = Field(
        None,
        description="Leave samples whose advantages are all 0 out of the update. Weights and logged losses stay the "
        "same: those samples still count in the denominators. Other actor metrics then cover the remaining "
        "samples. null: wherever that is exact, which is with policy losses that vanish with the advantage, and "
        "without KL loss and entropy bonus.",
    )

    @property
    def drops_zero_advantage(self) -> bool:
        """Whether samples without advantage are left out of the update."""
        return not self.trains_without_advantage if self.drop_zero_advantage is None else self.drop_zero_advantage

    @property
    def trains_without_advantage(self) -> list[str]:
        """Settings, as ``key=value`` below this section, by which a sample without advantage has a gradient."""
        objective = self.objective
        coeffs = {"kl_loss.coeff": objective.kl_loss.coeff, "entropy_coeff": objective.entropy_coeff}
        found = [f"objective.{key}={coeff}" for key, coeff in coeffs.items() if coeff]
        loss = objective.policy_loss.entry
        # a sample of a unit is compared with the others of it, whatever its own advantage
        if "vanishes_with_advantage" not in loss.traits or loss.together is not None:
            found.append(f"objective.policy_loss={objective.policy_loss.name}")
        return found

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.drop_zero_advantage:
            for setting in self.trains_without_advantage:
                yield (
                    "drop_zero_advantage",
                    f"leaves samples out that {setting} trains on; set it to null, or change {setting.split('=')[0]}",
                )
        loss, correction = self.objective.policy_loss, self.objective.correction
        if self.old_logprobs == "rollout" and "importance_ratio" in loss.entry.traits and _weighs(correction):
            yield (
                "objective.correction",
                f"weighs samples a second time: with old_logprobs=rollout the policy loss {loss.name} has the ratio to "
                "the rollout's policy already. Set it to null or to {name: mis, weight: one}, which only drops, or set "
                "old_logprobs=recompute",
            )


def _weighs(correction: Algorithm | None) -> bool:
    """Return whether ``correction`` multiplies by an importance ratio; it may also only drop samples."""
    if correction is None or "importance_ratio" not in correction.entry.traits:
        return False
    return not (isinstance(correction.params, MISParams) and correction.params.weight == "one")


class CriticSettings(FollowingRole):
    """The value model."""

    enable: bool | None = Field(None, description="null: only if the advantage estimator needs values.")
    model: ModelSettings | None = Field(None, description="Model to start from; null: the actor's.")
    optim: OptimSettings = Field(default_factory=lambda: OptimSettings(lr=1e-5), description="Optimizer and schedule.")
    mini_batch_size: int | None = Field(None, gt=0, description="Prompts per optimizer step; null: the actor's.")
    epochs: int | None = Field(None, ge=1, description="Passes over every batch; null: the actor's.")
    warmup_steps: int = Field(0, ge=0, description="The actor is updated from this step on (steps count from 1).")
    objective: ValueObjectiveSettings = Field(default_factory=ValueObjectiveSettings, description="Value loss.")


class FrozenRole(FollowingRole):
    """A model that is not trained."""

    model: ModelSettings | None = Field(None, description="The model; null: the actor's at the start of the run.")

    def problems(self) -> Iterator[tuple[str, str]]:
        for section, options in (self.__pydantic_extra__ or {}).items():
            if adapter_rank(options) is not None:
                yield (
                    f"{section}.lora",
                    "a frozen model trains no adapters: leave it out. The model folder of a run with adapters has "
                    "merged weights",
                )


class RefSettings(FrozenRole):
    """The frozen reference policy; built only if a KL loss or a KL penalty in the reward is used.

    An actor that trains adapters is also the reference: without its adapters it is the model of the run's start.
    """

    model: ModelSettings | None = Field(
        None,
        description="Reference model; null: the actor's at the start of the run. If the actor trains adapters, null "
        "builds no second model: the reference is the actor without its adapters.",
    )

    def is_actor(self, actor: ModelRole) -> bool:
        """Return whether the reference is ``actor`` without its adapters."""
        return self.model is None and adapter_rank(actor.options) is not None

    def unused(self, actor: ModelRole) -> Iterator[tuple[str, str]]:
        """Yield the keys that are set for a reference engine where the actor is the reference."""
        if not self.is_actor(actor):
            return
        sections = {} if self.engine is not None else self.__pydantic_extra__ or {}  # an engine brings its section
        found = {
            "engine": self.engine is not None,
            "max_tokens_per_micro_batch": self.max_tokens_per_micro_batch != AUTO,
            "offload": self.offload,
            **dict.fromkeys(sections, True),
        }
        for key in (key for key, is_set in found.items() if is_set):
            yield (
                key,
                "is for a reference engine, and there is none: the actor without its adapters is the reference. Leave "
                "it out, or build a second model with ref.model.path",
            )


class StepRewardSettings(Config):
    """How the scores of a process reward model become rewards: it is read at the last token of each step."""

    separator: str = Field("\n\n", min_length=1, description="Text between two steps, as in the model's training.")
    sigmoid: bool = Field(
        True, description="Turn scores, which are log-odds after training with bce, into probabilities."
    )
    combine: Literal["tokens", "sum", "mean", "min", "product", "last"] = Field(
        "tokens",
        description="tokens: the reward of a step is on its last token, and the completion's score is their sum; else "
        "the completion gets one reward, on its last token.",
    )


class RewardModelSettings(FrozenRole):
    """A frozen model that scores whole sequences at their last token, or their steps; its score is added to the
    reward's."""

    model: ModelSettings = Field(
        description="Model with a scalar score head (Hugging Face's sequence classification), for the policy's "
        "tokenizer."
    )
    coeff: float = Field(1.0, description="Factor on the model's score.")
    weights: list[float] | None = Field(
        None,
        min_length=1,
        description="Factors of the model's outputs, whose weighted sum is its score; null: it has one output.",
    )
    steps: StepRewardSettings | None = Field(
        None, description="The model is a process reward model; null: it scores the last token alone."
    )
    any_chat_template: bool = Field(
        False, description="Accept a model whose chat template writes conversations differently than the policy's."
    )

    @property
    def outputs(self) -> int:
        """Numbers per token of the model's head."""
        return 1 if self.weights is None else len(self.weights)


class PRMSettings(FollowingRole):
    """The process reward model, a language model: its log-ratio to the reference is the reward of each token."""

    model: ModelSettings | None = Field(None, description="Model to start from; null: the actor's.")
    optim: OptimSettings = Field(default_factory=lambda: OptimSettings(lr=1e-6), description="Optimizer and schedule.")
    mini_batch_size: int | None = Field(None, gt=0, description="Prompts per optimizer step; null: the actor's.")
    epochs: int = Field(1, ge=1, description="Passes over every batch.")
    beta: float = Field(0.05, gt=0, description="Factor on the log-ratio.")
    update: Literal["before", "after"] = Field(
        "before",
        description="When the model learns the outcomes of a batch: before or after it rewards that batch.",
    )
    right_above: float = Field(0.5, description="Completions with a higher score are right, the others wrong.")


class ValidationSampling(Config):
    """Sampling of completions in validation."""

    n: int = Field(1, ge=1, le=MOST_COMPLETIONS, description="Completions per validation prompt.")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    top_k: int = Field(0, ge=0, description="Sample among this many best tokens; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    min_p: float = Field(0.0, ge=0, le=1, description="Minimum probability as a fraction of the best token's.")


class RolloutSettings(PluginSections):
    """Generation. The engine's own options stand in a section of its name, such as ``inline``."""

    plugin_group: ClassVar[str] = "rlcore.rollout_engines"

    engine: str = Field("inline", description="Rollout engine (`rlcore plugins` lists the installed ones).")
    n: int = Field(8, ge=1, le=MOST_COMPLETIONS, description="Completions per prompt.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; training divides logits by it too.")
    top_k: int = Field(0, ge=0, description="Sample among this many best tokens; 0: all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    min_p: float = Field(0.0, ge=0, le=1, description="Minimum probability as a fraction of the best token's.")
    free_memory: bool = Field(
        True,
        description="Free the engine's memory (key-value cache; weights, if it has its own) between rollouts, of which "
        "asynchronous training has none.",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Strings that end a completion, besides the model's end of sequence."
    )
    validation: ValidationSampling = Field(default_factory=ValidationSampling, description="Sampling in validation.")
    environment: EnvironmentRole | None = Field(
        None,
        description="What the policy acts in: a name, the path of a class or function (file.py:Name), or a section; "
        "null: a rollout is one completion.",
    )


class ValidationRollout(ValidationSampling, PluginSections):
    """Generation in validation. The engine's own options stand in a section of its name, such as ``inline``."""

    plugin_group: ClassVar[str] = "rlcore.rollout_engines"

    engine: str = Field("inline", description="Rollout engine (`rlcore plugins` lists the installed ones).")
    max_response_length: int = Field(256, ge=1, description="Maximum length of a completion, in tokens.")
    free_memory: bool = Field(True, description="Free the engine's memory between validations.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="Strings that end a completion, besides the model's end of sequence."
    )


class RewardRole(RewardSettings, PluginSections):
    """The reward. Its own options stand in a section of its name, such as ``function``."""

    plugin_group: ClassVar[str] = "rlcore.rewards"
    plugin_field: ClassVar[str] = "name"
    short_forms: ClassVar = {"path": ShortForm("function.path", {"name": "function"})}

    name: str = Field(description="Reward (`rlcore plugins` lists the installed ones).")
    keep_special_tokens: bool = Field(
        False,
        description="Leave special tokens, which <think> and <tool_call> are in many tokenizers, in the text that the "
        "reward reads; all but the end token.",
    )
    max_error_ratio: float = Field(
        0.9,
        ge=0,
        le=1,
        description="End the run if the reward fails on more than this share of the samples of five steps; 1: never.",
    )
