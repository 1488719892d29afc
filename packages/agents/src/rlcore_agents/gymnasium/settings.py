"""Settings of `gymnasium`."""

from __future__ import annotations

from pydantic import Field, JsonValue, field_validator

from rlcore.config import FileName
from rlcore.object_path import checked_object_path
from rlcore_agents.environment.settings import EnvironmentSettings


class GymnasiumSettings(EnvironmentSettings):
    """Settings of `gymnasium`: an environment whose observations and actions are text."""

    env: FileName = Field(
        description="'file.py:name' or 'package.module:name' of a class or function that makes an environment with "
        "reset(seed=…) and step(action), as gymnasium has them."
    )
    kwargs: dict[str, JsonValue] = Field({}, description="Keyword arguments of the class or function.")

    @field_validator("env")
    @classmethod
    def _names_an_object(cls, path: str) -> str:
        return checked_object_path(path)
