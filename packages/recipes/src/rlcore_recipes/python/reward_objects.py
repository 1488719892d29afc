"""Rewards that are given as objects: functions, names, and lists of them."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from rlcore.boundary import reason
from rlcore.engines import Reward
from rlcore.errors import ConfigError
from rlcore_recipes.python.argument import Argument

ENDING = ".pickle"
"""Of files with functions, which the reward ``function`` loads in its processes."""


def reward_argument(reward: Any) -> Argument:
    """Return what ``reward=`` means: the reward ``function``, one of another name, or ``combine`` of several.

    Raises:
        ConfigError: it is none of them, or a function cannot be copied to other processes.
    """
    if not isinstance(reward, Sequence) or isinstance(reward, str):
        part = _part(reward, f"reward{ENDING}")
        return Argument(lambda folder: {"reward": part.section(folder)}, part.files)
    if not reward:
        raise ConfigError("reward= is an empty list; name at least one reward")
    weighted = [_weighted(number, item) for number, item in enumerate(reward)]
    parts = [_part(item, f"reward-{number}{ENDING}") for number, (item, _) in enumerate(weighted)]
    labels = _different([part.name for part in parts])

    def values(folder: Path) -> Mapping[str, Any]:
        rewards = [
            {**part.section(folder), "label": label, "weight": weight}
            for part, label, (_, weight) in zip(parts, labels, weighted)
        ]
        return {"reward": {"name": "combine", "combine": {"rewards": rewards}}}

    return Argument(values, {name: write for part in parts for name, write in part.files.items()})


def _weighted(number: int, item: Any) -> tuple[Any, float]:
    if not isinstance(item, tuple):
        return item, 1.0
    if len(item) != 2 or isinstance(item[1], bool) or not isinstance(item[1], (int, float)):
        raise ConfigError(f"reward[{number}] must be a reward or a pair (reward, weight), such as (my_function, 0.5)")
    return item[0], float(item[1])


@dataclass(frozen=True)
class _Part:
    """One reward.

    Attributes:
        name: in metrics; that of the reward if it has no ``path``.
        path: the function's, given the folder of inputs.
        files: see `Argument`.
    """

    name: str
    path: Callable[[Path], str] | None = None
    files: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)

    def section(self, folder: Path) -> dict[str, Any]:
        """Return the name of the reward and its options."""
        if self.path is None:
            return {"name": self.name}
        return {"name": "function", "function": {"path": self.path(folder)}}


def _part(reward: Any, file: str) -> _Part:
    """Return the part that ``reward`` makes; ``file`` is for a function that others cannot import."""
    if isinstance(reward, str):
        if "/" in reward and ".py" not in reward:
            raise ConfigError(
                f"reward={reward!r} looks like a model: one that scores is named by "
                f"overrides={{'reward_model.model.path': {reward!r}}}"
            )
        if ":" not in reward and not reward.endswith(".py"):
            return _Part(reward)
        return _Part(re.split(r"[:.]", reward)[-1], lambda folder: reward)
    _check_function(reward)
    name = _name_of(reward)
    if importable := _importable(reward):
        return _Part(name, lambda folder: importable)
    content = _pickled(reward, name)
    return _Part(name, lambda folder: f"{folder / file}:{name}", {file: lambda path: path.write_bytes(content)})


def _check_function(reward: Any) -> None:
    if isinstance(reward, torch.nn.Module):
        raise ConfigError(
            "reward= must be a function, not a model; a reward model that scores is named by its folder: "
            "overrides={'reward_model.model.path': …}"
        )
    if isinstance(reward, Reward) or not callable(reward):
        raise ConfigError(
            "reward= must be a function, the name of a reward, 'file.py:function', or a list of these, not a "
            f"{type(reward).__name__}"
        )


def _name_of(function: Any) -> str:
    """Return a name for metrics and messages, of letters, digits and underscores."""
    function = _within(function)
    name = re.sub(r"\W+", "_", getattr(function, "__name__", type(function).__name__)).strip("_")
    return name if name.isidentifier() and name.isascii() else "reward"


def _within(function: Any) -> Any:
    """Return the function in a partial object."""
    while isinstance(function, partial):
        function = function.func
    return function


def _different(names: Sequence[str]) -> list[str]:
    """Return ``names``, of which repeated ones get a number."""
    found: list[str] = []
    for name in names:
        count = next(count for count in range(1, len(names) + 1) if _numbered(name, count) not in found)
        found.append(_numbered(name, count))
    return found


def _numbered(name: str, count: int) -> str:
    return name if count == 1 else f"{name}_{count}"


def _importable(function: Any) -> str | None:
    """Return ``module:name`` of a function that other processes can import; None if they cannot."""
    if not inspect.isfunction(function) or not _importable_module(function.__module__ or ""):
        return None
    found: Any = sys.modules[function.__module__]
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return f"{function.__module__}:{function.__qualname__}" if found is function else None


def _importable_module(name: str) -> bool:
    """Return whether another process with the same ``sys.path`` finds the module ``name`` where this process has it."""
    module, parent = sys.modules.get(name), name.rpartition(".")[0]
    if module is None or name == "__main__" or (parent and not _importable_module(parent)):
        return False
    path = sys.modules[parent].__path__ if parent else None
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)  # importlib.util would ask the module itself
    spec = next((spec for spec in specs if spec is not None), None)
    return spec is not None and spec.origin == getattr(module, "__file__", spec.origin)  # built-in ones have no file


def _pickled(function: Any, name: str) -> bytes:
    """Return ``function`` with what it refers to, for processes that cannot import it."""
    home = sys.modules.get(getattr(_within(function), "__module__", None) or "")
    by_value = home is not None and not _importable_module(home.__name__)
    try:
        if by_value:
            cloudpickle.register_pickle_by_value(home)
        return bytes(cloudpickle.dumps(function))
    except Exception as error:
        raise ConfigError(
            f"the reward {name} cannot be copied to the processes that run it: {reason(error)}{_culprits(function)}; "
            "make that inside of the function, or put the function into a file and name it: reward='file.py:function'"
        ) from error
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(home)


def _culprits(function: Any) -> str:
    """Return " (it refers to …)" with the names of what cannot be pickled, as far as they can be found."""
    try:
        outside = inspect.getclosurevars(_within(function))
    except (TypeError, ValueError):
        return ""
    found = []
    for name, value in {**outside.globals, **outside.nonlocals}.items():
        try:
            cloudpickle.dumps(value)
        except Exception:
            found.append(f"{name}, a {type(value).__name__}")
    return f" (it refers to {'; '.join(found)})" if found else ""
