"""What a command of verl says, and what its translation is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Assignment:
    """One key of verl's configuration with its value.

    Attributes:
        key: dotted, as Hydra writes it: ``actor_rollout_ref.actor.optim.lr``.
        value: as Hydra's grammar reads it: a number, a boolean, None, text, a list or a dictionary.
        prefix: ``+`` (add), ``++`` (add or set), ``~`` (delete), or empty (set).
        place: where it was read, such as ``run.sh:12`` or ``argument 5``.
    """

    key: str
    value: Any
    prefix: str
    place: str


@dataclass(frozen=True)
class VerlCommand:
    """What starts a run of verl.

    Attributes:
        entry: the module that is run, such as ``verl.trainer.main_ppo`` or ``recipe.dapo.main_dapo``.
        assignments: in the order of the command line; the last one for a key wins.
    """

    entry: str
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True)
class Untranslated:
    """An assignment without an equivalent in rlcore's configuration.

    Attributes:
        reason: why there is none, and what to do instead.
        understood: False if the key is not one of verl's that are known.
    """

    assignment: Assignment
    reason: str
    understood: bool


@dataclass(frozen=True)
class Translation:
    """The configuration of a recipe that does what a command of verl does.

    Attributes:
        recipe: name of the recipe to run.
        config: the recipe's configuration, nested as in a file.
        comments: for a dotted key of ``config``, the keys of verl that it comes from.
        untranslated: assignments without an equivalent.
        notes: differences that no single key shows.
    """

    recipe: str
    config: dict[str, Any]
    comments: dict[str, str]
    untranslated: tuple[Untranslated, ...]
    notes: tuple[str, ...]
