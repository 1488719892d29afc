"""A run as the loop around its steps sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlcore.controller import Executor
from rlcore.engines import TrainEngine
from rlcore_kit.checkpoint.json_file import JsonFile
from rlcore_recipes.run.records import Records
from rlcore_recipes.run.timing import Timings


@dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Attributes:
        metrics: numbers by name.
        columns: titles of a table of completions; ``rows`` are its rows.
    """

    metrics: dict[str, float]
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()


class Stateful(Protocol):
    """A small part of a run's state, as plain values (JSON)."""

    @property
    def described_by(self) -> type[JsonFile]:
        """The model of `state`, with the ranges of its values."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def restore(self, state: Mapping[str, Any], /) -> None:
        """Continue from ``state``."""
        ...


class Trainable(Protocol):
    """The session of a recipe: `rlcore_recipes.run.session.Session`, or that of another kind of training.

    Attributes:
        config: has the sections ``trainer`` and ``seed``.
        records: histograms and tables of the step under way; its loop hands them to the trackers.
    """

    config: Any
    executor: Executor
    total_steps: int
    timed: Timings
    records: Records

    @property
    def max_error_ratio(self) -> float:
        """Share of samples whose reward may fail over some steps (see `Health`)."""
        ...

    @property
    def max_invalid_ratio(self) -> float:
        """Share of episodes that may be invalid over some steps (see `Health`)."""
        ...

    @property
    def engines(self) -> Mapping[str, TrainEngine]:
        """The engines whose state is in every checkpoint, by name. "actor" is exported at the end."""
        ...

    @property
    def parts(self) -> Mapping[str, Stateful]:
        """Further state by name, restored with that of the engines."""
        ...

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer into the folder of an exported model."""
        ...

    def about(self) -> Sequence[tuple[str, str]]:
        """Return what the run consists of, for the start banner.

        Called in every process, after a checkpoint was loaded.
        """
        ...


@dataclass
class Run:
    """What the loop does with a session.

    Attributes:
        step: makes the step of that number (from 1) and returns its metrics, ``perf/total_num_tokens`` among them.
        validate: measures the policy; None if nothing is validated.
        resumed: called after a checkpoint was loaded, with the number of steps done; None if there is nothing to do.
    """

    recipe: str
    session: Trainable
    step: Callable[[int], dict[str, float]]
    validate: Callable[[], Validation] | None = None
    resumed: Callable[[int], Any] | None = None
