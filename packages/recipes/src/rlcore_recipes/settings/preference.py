"""The configuration of preference optimisation."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from rlcore.algorithms.preferences import PreferenceObjectiveSettings
from rlcore.config import ForeignKey
from rlcore.engines import OptimSettings
from rlcore_recipes.data.settings import PreferenceDataSettings
from rlcore_recipes.foreign.answers import foreign_preference_keys
from rlcore_recipes.settings.roles import RefSettings
from rlcore_recipes.settings.supervised import SampleActorSettings, SampleTaskConfig


class PreferenceActorSettings(SampleActorSettings):
    """The model under training. One step is one optimizer step over one batch."""

    optim: OptimSettings = Field(default_factory=OptimSettings, description="Optimizer and schedule.")
    objective: PreferenceObjectiveSettings = Field(default_factory=PreferenceObjectiveSettings, description="Loss.")


class PreferenceConfig(SampleTaskConfig):
    """One run of preference optimisation on a data set."""

    data: PreferenceDataSettings = Field(description="Preferences; train_batch_size counts pairs, or single answers.")
    actor: PreferenceActorSettings = Field(
        default_factory=PreferenceActorSettings, description="The model under training."
    )
    ref: RefSettings = Field(
        default_factory=RefSettings, description="The frozen reference policy, for losses that compare with one."
    )
    precompute_ref: bool = Field(
        False,
        description="Compute the reference's log-probs of all samples before the first step, and keep them in out_dir. "
        "Without ref.model they are those of the actor before it is trained, so that there is no second model.",
    )

    @classmethod
    def foreign_keys(cls, name: str) -> Iterator[ForeignKey]:
        """Yield what TRL, OpenRLHF and verl mean by ``name``."""
        return foreign_preference_keys(name)

    @property
    def needs_ref(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return "ref_answer_logprob" in self.actor.objective.loss.entry.required_columns

    @property
    def needs_kl(self) -> bool:
        """Whether the loss reads the policy's distance from the reference."""
        return "kl_log_ratio" in self.actor.objective.loss.entry.required_columns

    @property
    def paired(self) -> bool:
        """Whether the loss compares two answers to one prompt."""
        return self.actor.objective.loss.entry.together is not None

    @property
    def ref_role(self) -> RefSettings | None:
        return self.ref if self.needs_ref else None

    @property
    def builds_ref(self) -> bool:
        return super().builds_ref and not (self.precompute_ref and self.ref.model is None)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield the key and the reason of what cannot work."""
        yield from super().problems()
        loss, data = self.actor.objective.loss, self.data
        if not self.needs_ref:
            if self.precompute_ref:
                yield "precompute_ref", f"is true, but the loss {loss.name} has no reference policy; set it to false"
            if self.ref.model is not None:
                yield "ref.model", f"would never be loaded: the loss {loss.name} has no reference policy"
        if self.needs_kl and data.train_batch_size < 2:
            yield (
                "data.train_batch_size",
                f"is 1, and {loss.name} estimates a KL divergence from the answers of a batch; set it to 2 or more",
            )
        if "margin" in loss.entry.required_columns and data.margin_key is None:
            yield "data.margin_key", f"must name the column of margins that the loss {loss.name} reads"
        unread = ["margin_key"] * ("margin" not in loss.entry.required_columns)
        for key in [*unread, *(["completion_key", "label_key"] if self.paired else [])]:
            if getattr(data, key) != type(data).model_fields[key].default:
                yield f"data.{key}", f"names a column that the loss {loss.name} does not read; leave it out"
