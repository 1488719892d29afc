"""Generate problems with reasoning-gym: ``python -m rlcore_agents.reasoning_gym.generation``, started by `data_set`.

A process for it, because some generators iterate over sets of text, whose order is another one in every process unless
PYTHONHASHSEED is set, and some print.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from rlcore.boundary import boundary
from rlcore.errors import ConfigError, DataError, RlcoreError

TRIES = 5
"""Draws per wanted problem before the problems of a task count as exhausted; a hundred more for small numbers."""

Problem = dict[str, Any]


def main() -> None:
    """Read a request from standard input and write the answer, both JSON, to standard output."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what generators print
    answer: dict[str, Any]
    try:
        answer = {"splits": generate(**json.load(sys.stdin))}
    except RlcoreError as error:
        answer = {"error": str(error)}
    with os.fdopen(answers, "w") as file:
        json.dump(answer, file)


def generate(task: str, n: int, test: int, seed: int, config: Mapping[str, Any]) -> dict[str, list[Problem]]:
    """Return problems by split, the tasks taking turns. The arguments are fields of `settings.ReasoningGymData`.

    The test problems do not depend on how many training problems there are.

    Raises:
        ConfigError: there is no such task, or it has no such parameter.
        DataError: a task has too few different problems.
    """
    names = _names(task)
    configs = _configs(names, config)
    splits: dict[str, list[list[Problem]]] = {"test": [], "train": []}
    for number, name in enumerate(names):
        seen: set[str] = set()
        for split, problems in splits.items():
            total = test if split == "test" else n
            wanted = total // len(names) + (number < total % len(names))
            problems.append(_problems(name, configs[name], f"{split} {seed}", wanted, seen))
    return {
        split: [problem[turn] for turn in range(max(map(len, found))) for problem in found if turn < len(problem)]
        for split, found in splits.items()
        if any(found)
    }


def _names(task: str) -> list[str]:
    known = sorted(DATASETS.keys() - {"composite"})  # a mixture of the others
    if task.strip() == "all":
        return known
    names = [name.strip() for name in task.split(",")]
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"reasoning-gym has no task {name!r}; {hint}")
        if names.count(name) > 1:
            raise ConfigError(f"the task {name} is given twice")
    return names


def _configs(names: list[str], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parameters of every task, of which those given exist."""
    configs = {name: dict(config) for name in names} if len(names) == 1 else {name: {} for name in names}
    if len(names) > 1 or set(config) == set(names):
        for name, given in config.items():
            if name not in names or not isinstance(given, dict):
                raise ConfigError(f"--config {name}=…: of several tasks, write {names[0]}.{name}=… for one of them")
            configs[name] = given
    for name, given in configs.items():
        fields = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
        for key in given:
            if key in ("seed", "size"):
                raise ConfigError(f"--config {key}=…: set --{key.replace('size', 'n')} instead")
            if key not in fields:
                raise ConfigError(f"the task {name} has no parameter {key!r}; it has {', '.join(fields)}")
    return configs


def _problems(name: str, config: dict[str, Any], seed: str, wanted: int, seen: set[str]) -> list[Problem]:
    """Return ``wanted`` problems whose questions are not in ``seen``, and add these.

    reasoning-gym draws problem ``index`` from the sum of seed and index: seeds that lie close give the same problems.
    """
    if not wanted:
        return []
    start = random.Random(f"reasoning-gym {name} {seed}").randrange(2**31)
    found: list[Problem] = []
    for index, entry in enumerate(_entries(name, {**config, "seed": start, "size": TRIES * wanted + 100})):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            found.append(
                {
                    "question": entry["question"],
                    "answer": entry["answer"],
                    "task": name,
                    "entry": _literal(name, entry),
                    "config": json.dumps({**config, "seed": start}),
                    "source_index": index,
                }
            )
            if len(found) == wanted:
                return found
    raise DataError(
        f"found only {len(seen)} different problems of the task {name}; ask for fewer, or for harder ones (--config)"
    )


def _entries(name: str, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with boundary(f"reasoning-gym cannot make problems of the task {name}", ConfigError):
        data = reasoning_gym.create_dataset(name, **config)
        yield from (data[index] for index in range(config["size"]))


def _literal(name: str, entry: dict[str, Any]) -> str:
    """Write an entry so that it is read with the same types: scorers tell lists from tuples, which JSON does not."""
    text = repr(_plain(entry))
    with boundary(f"the task {name} makes problems that cannot be written down", DataError):
        ast.literal_eval(text)
    return text


def _plain(value: Any) -> Any:
    """Replace numpy's numbers and texts, which tasks of 0.1.25 leave in their metadata."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


if __name__ == "__main__":
    main()
