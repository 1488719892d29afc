"""The configuration of generation with a model outside of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from rlcore.config import Config, FileName
from rlcore.engines import ModelSettings
from rlcore_recipes.settings.evaluation import EvalDataSettings, EvalRolloutSettings

FROM_RUN = ("prompt_key", "system_prompt", "apply_chat_template", "chat_template_kwargs", "max_response_length")
"""Keys of the section ``data`` that hold as the run has them."""


class PromptSettings(EvalDataSettings):
    """Where prompts come from, and how they become tokens."""

    val_files: list[FileName] = Field([], description="Files of prompts, which the option --file names.")
    data_source_key: str | None = Field(None, description="Column that names the data set of a row; null: not read.")
    ground_truth_key: str | None = Field(None, description="Column of the reference answer; null: not read.")
    max_prompt_length: int = Field(4096, ge=1, description="Maximum length of a prompt or conversation, in tokens.")
    overlong_prompts: Literal["filter", "error"] = Field(
        "error", description="What to do with prompts longer than max_prompt_length: leave them out, or stop."
    )


class GenerationConfig(Config):
    """Generation with one model."""

    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of every completion.")
    model: ModelSettings = Field(description="The model; SOURCE is its path.")
    data: PromptSettings = Field(default_factory=PromptSettings, description="Prompts.")
    rollout: EvalRolloutSettings = Field(default_factory=EvalRolloutSettings, description="Engine and sampling.")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.rollout.environment is not None:
            yield "rollout.environment", "takes no part in generation; evaluate episodes with rlcore eval"
