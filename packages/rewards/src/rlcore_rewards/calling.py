"""Load and call a user's reward function; imported in workers only."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import reduce
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from rlcore.engines.reward import RewardSample
from rlcore.suggestions import functions_of
from rlcore_rewards.forms import prepare
from rlcore_rewards.reply import WorkerFailure

PICKLE = ".pickle"
"""Ending of a file that holds a function, written by cloudpickle."""


def load(options: Mapping[str, Any]) -> Callable[[RewardSample], Any]:
    """Load a user's function and return a function that calls it with a sample.

    `rlcore_rewards.forms` describes what the user's function takes; ``kwargs`` come in addition. It may be a coroutine
    function; all calls share one event loop.

    Args:
        options: ``home`` (a file or module), ``name`` of the function in it, its ``form``, and ``kwargs``. A file that
            ends with `PICKLE` holds the function itself.

    Raises:
        WorkerFailure: the function does not exist or takes other arguments.
    """
    home, name, kwargs = options["home"], options["name"], options["kwargs"]
    if home.endswith(PICKLE):
        function = cloudpickle.loads(Path(home).read_bytes())
    else:
        module = _from_file(Path(home)) if home.endswith(".py") else _from_import(home)
        try:
            function = reduce(getattr, name.split("."), module)
        except AttributeError:
            raise WorkerFailure("startup", f"{home} has no {name!r}{functions_of(module)}") from None
    if not callable(function):
        raise WorkerFailure("startup", f"{name!r} in {home} is a {type(function).__name__}, not a function")
    arguments_of = prepare(function, options["form"], kwargs)
    runner = asyncio.Runner()

    async def wait(value: Awaitable[Any]) -> Any:
        return await value

    def score(sample: RewardSample) -> Any:
        arguments, finish = arguments_of(sample)
        value = function(sample, **kwargs) if arguments is None else function(**arguments, **kwargs)
        return finish(runner.run(wait(value)) if inspect.isawaitable(value) else value)

    return score


def _from_file(file: Path) -> ModuleType:
    sys.path.insert(0, str(file.parent))  # the file can import its neighbours, as a script can
    spec = spec_from_file_location(f"reward_function_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and others look up their module here
    spec.loader.exec_module(module)
    return module


def _from_import(home: str) -> ModuleType:
    try:
        return import_module(home)
    except ModuleNotFoundError as error:
        if error.name and (home == error.name or home.startswith(f"{error.name}.")):
            raise WorkerFailure("startup", f"there is no module {error.name!r}") from None
        raise
