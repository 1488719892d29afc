"""Options of the data set and of the reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import Field, JsonValue

from rlcore.config import Config, Package

PACKAGE = Package("reasoning_gym", "rlcore-agents[reasoning-gym]")


class ReasoningGymData(Config):
    """Options of ``rlcore data reasoning-gym``."""

    task: str = Field(description="Tasks separated by commas, such as chain_sum,gcd; 'all' for all of them.")
    n: int = Field(ge=1, description="Problems to train on, shared equally by the tasks.")
    test: int = Field(0, ge=0, description="Problems to test on, none of which is a problem to train on.")
    seed: int = Field(0, ge=0, description="The same seed makes the same problems.")
    config: Mapping[str, JsonValue] = Field(
        {},
        description="A parameter of the task (min_terms=3); with several tasks, of one of them (gcd.max_numbers=3).",
    )
    instruction: str = Field(
        "Put your final answer, and nothing else, between <answer> and </answer>.",
        description="Text after every question; may be empty.",
    )


class ReasoningGymReward(Config):
    """Options of the reward ``reasoning_gym``."""

    extraction: Literal["tag", "whole"] = Field(
        "tag",
        description="What is scored: 'tag': the text in the last <answer>…</answer>, and no answer without it; "
        "'whole': the completion without surrounding white space.",
    )

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", PACKAGE
