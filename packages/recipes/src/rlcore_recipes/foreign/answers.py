"""The answer to a key that rlcore does not have and another framework has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from rlcore.config import ForeignKey
from rlcore_recipes.foreign.names import OPENRLHF, TRL, Equivalent
from rlcore_recipes.foreign.preference_names import OPENRLHF_PREFERENCES, TRL_PREFERENCES
from rlcore_recipes.foreign.reward_names import OPENRLHF_REWARDS, TRL_REWARDS
from rlcore_recipes.from_verl.keys.entries import ANY, Key
from rlcore_recipes.from_verl.keys.table import Table, reinforcement_table, supervised_table


def foreign_keys(name: str, *, supervised: bool = False) -> Iterator[ForeignKey]:
    """Yield what the dotted key ``name`` is in verl, TRL and OpenRLHF.

    Of TRL and OpenRLHF the last part counts, because their arguments have no sections. Of verl it is the whole name, or
    its last part.

    Args:
        supervised: the recipe fine-tunes without reinforcement learning.
    """
    last = name.rpartition(".")[2]
    table = supervised_table() if supervised else reinforcement_table()
    own_section = name.partition(".")[0] in (
        "rollout",
        "reward_model",
    )  # of which verl's entries for all keys know nothing
    exact = table.find(name) if "." in name else None
    if exact is not None and (name in table or not own_section):
        yield _of_verl(name, exact)
        return
    known: set[tuple[str, ...]] = set()
    for framework, names in (("TRL", TRL), ("OpenRLHF", OPENRLHF)):
        if last in names and names[last].ours not in known:
            known.add(names[last].ours)
            yield ForeignKey(framework, last, names[last].ours, names[last].remark)
    for entry in _by_last_part(table).get(last, ()):
        same_name = any(target.rpartition(".")[2] == last for target in entry.ours)
        if entry.ours and entry.ours not in known and not same_name:
            known.add(entry.ours)
            yield _of_verl(entry.name, entry)


def foreign_preference_keys(name: str) -> Iterator[ForeignKey]:
    """Yield what the dotted key ``name`` is in preference optimisation with TRL or OpenRLHF, or else elsewhere."""
    yield from _foreign_task_keys(name, TRL_PREFERENCES, OPENRLHF_PREFERENCES)


def foreign_reward_keys(name: str) -> Iterator[ForeignKey]:
    """Yield what the dotted key ``name`` is in reward-model training with TRL or OpenRLHF, or else elsewhere."""
    yield from _foreign_task_keys(name, TRL_REWARDS, OPENRLHF_REWARDS)


def _foreign_task_keys(
    name: str, trl: Mapping[str, Equivalent], openrlhf: Mapping[str, Equivalent]
) -> Iterator[ForeignKey]:
    last = name.rpartition(".")[2]
    found = [
        ForeignKey(framework, last, names[last].ours, names[last].remark)
        for framework, names in (("TRL", trl), ("OpenRLHF", openrlhf))
        if last in names
    ]
    yield from found or foreign_keys(name, supervised=True)


def _of_verl(name: str, entry: Key) -> ForeignKey:
    ours = tuple(target.removesuffix(ANY) for target in entry.ours)
    return ForeignKey("verl", name, ours, entry.meaning)


@cache
def _by_last_part(table: Table) -> dict[str, list[Key]]:
    found: dict[str, dict[Key, None]] = {}
    for name in table.names:
        entry = table.find(name)
        assert entry is not None
        found.setdefault(name.rpartition(".")[2], {})[entry] = None
    return {name: list(entries) for name, entries in found.items()}
