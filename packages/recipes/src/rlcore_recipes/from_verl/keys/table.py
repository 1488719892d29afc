"""All keys of verl that are known, for reinforcement learning and for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.keys import (
    actor,
    algorithm,
    asynchronous,
    critic,
    data,
    model,
    reward,
    rollout,
    supervised,
    trainer,
)
from rlcore_recipes.from_verl.keys.entries import ANY, UNSET, Key
from rlcore_recipes.from_verl.view import VerlView

SUPERVISED = ("sft_trainer", "fsdp_sft_trainer", "sft_trainer_ray")
OTHER_COMMANDS = {
    "main_generation": "generates with a model: use `rlcore generate`",
    "main_generation_server": "generates with a model: use `rlcore generate`",
    "main_eval": "evaluates completions: use `rlcore eval`",
    "model_merger": "converts a checkpoint: use `rlcore export`",
}


class Table:
    """The keys of one kind of command."""

    def __init__(self, keys: Iterable[Key], *, supervised: bool = False) -> None:
        self.supervised = supervised
        self._exact: dict[str, Key] = {}
        self._names: dict[str, str] = {}
        self._sections: dict[str, Key] = {}
        for entry in keys:
            for name in (entry.name, *entry.old):
                if name.endswith(ANY):
                    self._sections[name.removesuffix("*")] = entry
                else:
                    self._exact[name] = entry
                    self._names[name] = entry.name

    def __iter__(self) -> Iterator[Key]:
        return iter(dict.fromkeys([*self._exact.values(), *self._sections.values()]))

    def __contains__(self, name: str) -> bool:
        return name in self._exact

    @property
    def names(self) -> list[str]:
        """All names of keys, old ones included."""
        return list(self._exact)

    def canonical(self, name: str) -> str:
        """Return the name that the table has for the key ``name``."""
        return self._names.get(name, name)

    def find(self, name: str) -> Key | None:
        """Return the entry of ``name``: its own, else that of the innermost section."""
        if name in self._exact:
            return self._exact[name]
        sections = [section for section in self._sections if name.startswith(section)]
        return self._sections[max(sections, key=len)] if sections else None

    def has_section(self, name: str) -> bool:
        """Return whether keys of verl are below ``name``."""
        return any(known.startswith(f"{name}.") for known in (*self._exact, *self._sections))

    def view(self, entry: str, given: Mapping[str, Any]) -> VerlView:
        """Return the configuration of the module ``entry`` with the values ``given``, by the names of the table."""
        defaults = {known.name: known.default for known in self._exact.values() if known.default is not UNSET}
        return VerlView(entry, given, defaults, self._names, supervised=self.supervised)


@cache
def reinforcement_table() -> Table:
    """Return the keys of verl's reinforcement-learning trainers."""
    parts = (data, model, actor, rollout, critic, algorithm, reward, asynchronous)
    return Table([entry for part in parts for entry in part.KEYS] + list(trainer.KEYS))


@cache
def supervised_table(former: bool = False) -> Table:
    """Return the keys of verl's SFT trainers, with the defaults of the later ones or of the former one."""
    defaults = supervised.FSDP_TRAINER if former else supervised.ENGINE_TRAINER
    keys = [*trainer.SFT_KEYS, *supervised.KEYS]
    known = [replace(k, default=defaults[k.name], written=True) if k.name in defaults else k for k in keys]
    return Table(known, supervised=True)


def table_of(entry: str) -> Table:
    """Return the table for the module ``entry``.

    Raises:
        ConfigError: the module trains nothing.
    """
    name = entry.removesuffix(".py").replace("/", ".").rpartition(".")[2]
    if name in OTHER_COMMANDS:
        raise ConfigError(f"{entry} {OTHER_COMMANDS[name]}")
    return supervised_table(name == "fsdp_sft_trainer") if name in SUPERVISED else reinforcement_table()
