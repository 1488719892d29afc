"""Settings of environments in Python."""

from __future__ import annotations

from pydantic import Field, JsonValue, field_validator

from rlcore.config import FileName, Seconds
from rlcore.object_path import checked_object_path
from rlcore_agents.conversation import ConversationSettings


class EnvironmentSettings(ConversationSettings):
    """What holds for environments in Python, those of users and those of this package."""

    turn_timeout_s: Seconds = Field(
        60.0,
        gt=0,
        description="Seconds that the environment may take between two replies of the policy, its tools included, to "
        "begin and to close.",
    )
    max_observation_chars: int = Field(
        32768, ge=100, description="Longer messages of the environment and of tools are cut to so many characters."
    )


class PythonEnvironmentSettings(EnvironmentSettings):
    """Settings of `python`: an environment that is a class or a function."""

    path: FileName = Field(
        description="'file.py:name' or 'package.module:name' of a subclass of rlcore_agents.Environment, or of a "
        "function that takes a chat and a sample and returns a score."
    )
    kwargs: dict[str, JsonValue] = Field(
        {}, description="Keyword arguments of the class, or additional ones of the function."
    )
    processes: int = Field(
        0,
        ge=0,
        le=4096,
        description="Worker processes of each rollout process, in which environments run, one episode at a time each. "
        "One that crashes or hangs is killed with everything that it started. 0: in the rollout process, any number at "
        "a time.",
    )
    startup_timeout_s: Seconds = Field(120.0, gt=0, description="Seconds that a worker process may take to start.")
    memory_mb: int = Field(4096, gt=0, description="Memory of a worker process and its children, in MiB.")
    max_processes: int = Field(256, gt=0, le=2**20, description="Processes that a worker and its children may be.")
    pass_env: tuple[str, ...] = Field(
        (), description="Environment variables (API keys …) that workers see besides PATH, HOME, locale and the like."
    )

    @field_validator("path")
    @classmethod
    def _names_an_object(cls, path: str) -> str:
        return checked_object_path(path)
