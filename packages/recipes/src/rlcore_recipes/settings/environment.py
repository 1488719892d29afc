"""Settings of the environment that makes a rollout an episode of several turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from rlcore.config import Config, PluginSections, ShortForm
from rlcore.engines.reward import LARGEST_SCORE


class EnvironmentRole(PluginSections):
    """What the policy acts in. The environment's own options stand in a section of its name, such as ``python``."""

    plugin_group: ClassVar[str] = "rlcore.environments"
    plugin_field: ClassVar[str] = "name"
    short_forms: ClassVar = {
        "path": ShortForm("python.path", {"name": "python"}),
        "command": ShortForm("command.command", {"name": "command"}),
    }

    name: str = Field(description="Environment (`rlcore plugins` lists the installed ones).")
    max_turns: int = Field(16, ge=1, description="Maximum completions of the policy in an episode.")
    turn_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum tokens of a completion; null: what data.max_response_length leaves, which bounds "
        "everything after the prompt, answers of tools and users included.",
    )
    timeout_s: float = Field(600.0, gt=0, description="Maximum seconds of an episode; a longer one is invalid.")
    retries: int = Field(1, ge=0, description="How often an invalid episode is run again, each time with another seed.")
    error_score: float | None = Field(
        None,
        ge=-LARGEST_SCORE,
        le=LARGEST_SCORE,
        description="Score of episodes that stay invalid; null: nothing is learned from them.",
    )
    max_invalid_ratio: float = Field(
        0.9,
        ge=0,
        le=1,
        description="End the run if more than this share of the episodes of five steps is invalid; 1: never.",
    )

    @classmethod
    def from_text(cls, text: str) -> Mapping[str, Any]:
        """Return the values that a text means: the path of a class or function (``file.py:Name``), or a name."""
        return {"path": text} if ":" in text or text.endswith(".py") else {"name": text}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        text = {"type": "string", "description": "Name of an environment, or path of one (file.py:Name)."}
        return {"anyOf": [super().__get_pydantic_json_schema__(core_schema, handler), text]}


def with_environment_reward(model: type[Config], values: Any) -> Any:
    """Return ``values`` with the name of the reward: ``environment``, if one is set and no reward is named."""
    if not isinstance(values, Mapping) or not model.model_fields["reward"].is_required():
        return values
    rollout, reward = values.get("rollout"), values.get("reward", {})
    environment = rollout.get("environment") if isinstance(rollout, Mapping) else getattr(rollout, "environment", None)
    if environment is None or not isinstance(reward, Mapping) or reward.keys() & {"name", "path"}:
        return values
    return {**values, "reward": {**reward, "name": "environment"}}
