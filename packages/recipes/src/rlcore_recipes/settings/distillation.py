"""The configuration of distillation: teachers, where completions come from, and the student's loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from rlcore.algorithms.distillation import DistillObjectiveSettings
from rlcore.algorithms.divergence import JSDParams
from rlcore.config import Config, PluginSections
from rlcore.engines import ModelSettings
from rlcore.engines.settings import adapter_rank
from rlcore_recipes.settings.algorithm import AlgorithmSettings
from rlcore_recipes.settings.reinforcement import RLConfig
from rlcore_recipes.settings.roles import ActorSettings, FrozenRole, RewardRole, RolloutSettings

SMALLEST_SHARE = 0.05
"""Of a model in the mixture of a Jensen–Shannon divergence that still has a useful gradient."""
TeacherName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]+$", max_length=50)]


class ScoringRole(PluginSections):
    """A teacher that runs elsewhere, in a scoring engine, whose options stand in a section of its name (``http``)."""

    plugin_group: ClassVar[str] = "rlcore.scoring_engines"

    engine: str = Field("http", description="Scoring engine (`rlcore plugins` lists the installed ones).")


class TeacherSettings(FrozenRole):
    """A frozen model that the student learns from."""

    model: ModelSettings | None = Field(
        None,
        description="The teacher; null: the model under training itself. With scoring, the model whose tokenizer and "
        "chat template are the teacher's; null: the student's.",
    )
    scoring: ScoringRole | None = Field(
        None, description="Where the teacher runs, such as servers by URL; null: in a training engine of this run."
    )
    cross_tokenizer: bool = Field(
        False,
        description="The teacher has another tokenizer: log-probs of chunks of text are compared, which end where both "
        "have a boundary of tokens.",
    )
    weights: Literal["start", "current"] = Field(
        "start",
        description="Without model, the weights that teach: those at the start of the run, or the student's in each "
        "step.",
    )
    data_sources: list[str] = Field([], description="Data sources that it teaches; empty: those without a teacher.")
    prompt_key: str | None = Field(
        None,
        description="Column with the prompt (text or messages) under which the teacher sees a completion; null: the "
        "student's prompt. The completion has the same tokens in both.",
    )
    prompt_template: str | None = Field(
        None,
        description="Text that replaces the last message of the prompt, for the teacher alone, with {prompt}, "
        "{ground_truth}, {data_source} and {COLUMN} of the data.",
    )

    @property
    def sees_other_prompt(self) -> bool:
        """Whether the teacher's prompt says something else than the student's."""
        return self.prompt_key is not None or self.prompt_template is not None

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.prompt_key is not None and self.prompt_template is not None:
            yield "prompt_template", f"is set, and so is prompt_key={self.prompt_key}: keep one of them"
        if self.model is not None and self.weights == "current":
            yield "weights", "is current, which are the student's weights, but model names another model: remove one"
        if self.scoring is not None:
            for key in sorted({"engine", "offload", "max_tokens_per_micro_batch"} & self.model_fields_set):
                yield key, "is for a teacher in a training engine, and this one has scoring: remove one"
        if self.scoring is not None and self.weights == "current":
            yield "weights", "is current, which are the student's weights, but scoring has other ones: remove one"
        if self.cross_tokenizer and self.model is None:
            yield "model", "is null, and cross_tokenizer needs the teacher's tokenizer: name its folder in model.path"
        if self.model is None and not self.sees_other_prompt and self.weights == "current":
            yield (
                "weights",
                "is current without another prompt: the student would learn from itself what it knows already; set "
                "prompt_key or prompt_template, or model",
            )


class DistillSettings(Config):
    """Teachers, and where completions come from."""

    teachers: dict[TeacherName, TeacherSettings] = Field(
        min_length=1, description="Teachers by name. Each is a role (teacher_NAME) that controller.placement can place."
    )
    advantage_coeff: float = Field(
        0.0,
        ge=0,
        description="Weight of −(log π − log π_teacher) of each sampled token in its advantage: the reverse KL by "
        "policy gradient, which needs the teacher's log-probs of sampled tokens alone.",
    )
    on_policy_fraction: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of prompts that the student completes (GKD's λ); the others have completions in the data.",
    )
    response_key: str = Field("response", description="Column with completions, for on_policy_fraction below 1.")

    def problems(self) -> Iterator[tuple[str, str]]:
        named = Counter(source for teacher in self.teachers.values() for source in teacher.data_sources)
        for source in (source for source, count in named.items() if count > 1):
            yield "teachers", f"several teachers have the data source {source!r}: name it once"
        if sum(not teacher.data_sources for teacher in self.teachers.values()) > 1:
            yield "teachers", "several teachers have no data_sources: say for all but one which sources they teach"


class DistillActorSettings(ActorSettings):
    """The student."""

    objective: DistillObjectiveSettings = Field(
        default_factory=DistillObjectiveSettings, description="Divergence from the teacher, and further terms."
    )
    drop_zero_advantage: Literal[False] = Field(False, description="Samples without advantage are trained on too.")


class DistillConfig(RLConfig):
    """One run of distillation."""

    actor: DistillActorSettings = Field(default_factory=DistillActorSettings, description="The student.")
    distill: DistillSettings = Field(description="Teachers, and where completions come from.")
    rollout: RolloutSettings = Field(default_factory=lambda: RolloutSettings(n=1), description="Generation.")
    reward: RewardRole = Field(
        default_factory=lambda: RewardRole(name="none"), description="Task reward of completions; none: no reward."
    )
    algorithm: AlgorithmSettings = Field(
        default_factory=lambda: AlgorithmSettings(advantage="reinforce_plus_plus"),
        description="Advantages of the task reward, and reward shaping.",
    )

    @property
    def needs_scores(self) -> bool:
        """Whether nothing is learned without scores: teachers suffice."""
        return False

    @property
    def response_key(self) -> str | None:
        """The column of completions that are trained on; None if the student makes all."""
        return self.distill.response_key if self.distill.on_policy_fraction < 1 else None

    @property
    def sampled_fraction(self) -> float:
        """The share of prompts that the student completes."""
        return self.distill.on_policy_fraction

    @property
    def frozen_models(self) -> Mapping[str, FrozenRole]:
        """The teachers that need a second model, by role."""
        return {f"teacher_{name}": teacher for name, teacher in self.distill.teachers.items() if self.builds(teacher)}

    def builds(self, teacher: TeacherSettings) -> bool:
        """Return whether ``teacher`` needs an engine: the student is one, and its frozen weights below adapters."""
        if teacher.scoring is not None:
            return False
        if teacher.model is not None:
            return True
        return teacher.weights == "start" and adapter_rank(self.actor.options) is None

    @property
    def has_advantages(self) -> bool:
        """Whether samples get a policy gradient."""
        objective = self.actor.objective
        return bool(
            self.reward.name != "none"
            or self.reward_model is not None
            or self.distill.advantage_coeff
            or self.algorithm.kl_in_reward is not None
            or objective.kl_loss.coeff
            or objective.entropy_coeff
        )

    @property
    def needed_columns(self) -> frozenset[str]:
        """The columns that the advantages and the policy loss are computed from."""
        return super().needed_columns | ({"old_logprobs"} if self.distill.advantage_coeff else frozenset())

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the log-probs of the sampling policy must be known before the update."""
        return self.has_advantages and super().needs_old_logprobs

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what cannot work."""
        yield from super().problems()
        objective, distill = self.actor.objective, self.distill
        divergence = objective.divergence
        if not divergence.coeff and not distill.advantage_coeff:
            yield (
                "actor.objective.divergence.coeff",
                "is 0, and so is distill.advantage_coeff: nothing would be learned from the teacher; set one of them",
            )
        if divergence.coeff and divergence.top_k is None and len(distill.teachers) > 1:
            yield (
                "actor.objective.divergence.top_k",
                "is null (the whole vocabulary), which takes one teacher: set it, to 64 say, for several teachers",
            )
        yield from self._teacher_problems()
        if distill.on_policy_fraction == 1 and objective.nll_coeff:
            yield (
                "actor.objective.nll_coeff",
                "is for completions of the data set, and distill.on_policy_fraction=1 uses none: set it to 0, or lower "
                "on_policy_fraction",
            )
        if distill.on_policy_fraction < 1:
            needs = {"old_logprobs": self.actor.old_logprobs == "rollout", "objective.correction": objective.correction}
            for key in (key for key, used in needs.items() if used):
                yield (
                    f"actor.{key}",
                    "needs the rollout's log-probs, which completions of the data set do not have: leave it out, or "
                    "set distill.on_policy_fraction=1",
                )

    def doubts(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what is almost surely a mistake."""
        yield from super().doubts()
        params, advantage = self.actor.objective.divergence.kind.params, self.algorithm.advantage
        if isinstance(params, JSDParams) and 0 < min(params.beta, 1 - params.beta) < SMALLEST_SHARE:
            yield (
                "actor.objective.divergence.kind",
                f"jsd with beta={params.beta:g} has hardly any gradient, as the formula tends to 0 at its ends; beta=0 "
                "and beta=1 are forward and reverse KL instead",
            )
        mixed = self.reward.name != "none" and self.distill.on_policy_fraction < 1
        if mixed and "compares_group" not in advantage.entry.traits:
            yield (
                "algorithm.advantage",
                f"{advantage.name} compares all samples of a batch, among them completions of the data set, which no "
                "policy gradient trains: take one that compares the completions of a prompt (grpo, rollout.n=8)",
            )

    def _teacher_problems(self) -> Iterator[tuple[str, str]]:
        """Yield what teachers elsewhere, or with other tokenizers, cannot say."""
        divergence, teachers = self.actor.objective.divergence, self.distill.teachers
        served = [name for name, teacher in teachers.items() if teacher.scoring is not None]
        crossing = [name for name, teacher in teachers.items() if teacher.cross_tokenizer]
        if served and divergence.coeff and divergence.top_k is None:
            yield (
                "actor.objective.divergence.top_k",
                f"is null (the whole vocabulary), which the scoring engine of the teacher {served[0]} does not return: "
                "set it, to 20 say, or divergence.coeff=0 with distill.advantage_coeff=1",
            )
        if served and self.rollout.temperature != 1:
            yield (
                "rollout.temperature",
                f"is {self.rollout.temperature:g}, but the scoring engine of the teacher {served[0]} returns log-probs "
                "of temperature 1: set it to 1",
            )
        if crossing and divergence.coeff:
            yield (
                "actor.objective.divergence.coeff",
                f"is {divergence.coeff:g}, but the teacher {crossing[0]} has other tokens (cross_tokenizer), of which "
                "there are no divergences: set it to 0, and distill.advantage_coeff to 1",
            )
        if crossing and len(crossing) < len(teachers):
            yield "distill.teachers", f"{crossing[0]} has cross_tokenizer: set it for all teachers, or for none"
