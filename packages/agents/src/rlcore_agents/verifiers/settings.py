"""Options of the environment ``verifiers`` and of its data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from rlcore.config import Config, Package
from rlcore_agents.conversation.settings import ConversationSettings

PACKAGE = Package("verifiers", "rlcore[verifiers]")


class VerifiersSettings(ConversationSettings):
    """Which environment of verifiers plays the episodes."""

    env: dict[str, Any] = Field(
        default_factory=dict,
        description="The environment, with the keys that `vf-eval` takes below --env: taskset.id and further keys of "
        "the task set, id for an environment of several agents, and for every agent harness, runtime, max_turns …",
    )

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "env", PACKAGE

    def problems(self) -> Iterator[tuple[str, str]]:
        taskset = self.env.get("taskset")
        if not isinstance(taskset, dict) or not isinstance(taskset.get("id"), str):
            yield "env", "needs taskset.id, the name of an installed task set (as the first argument of vf-eval)"


class VerifiersData(Config):
    """Options of ``rlcore data verifiers``."""

    taskset: str = Field(description="Name of an installed task set, as the first argument of vf-eval.")
    config: dict[str, Any] = Field(
        default_factory=dict, description="A key of the task set, as vf-eval takes it below --env.taskset."
    )
    n: int = Field(1024, ge=1, description="Tasks to train on; a task set that has fewer gives all of them.")
    test: int = Field(0, ge=0, description="Tasks to test on, which come after those to train on.")
    shuffle: bool = Field(False, description="Shuffle the tasks first, which reads the whole task set.")
    seed: int = Field(0, ge=0, description="Seed of the shuffle.")
