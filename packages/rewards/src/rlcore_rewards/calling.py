"""Load and call a user's reward function; imported in workers only."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle

from rlcore.engines.reward import RewardSample
from rlcore.errors import ConfigError
from rlcore.object_path import load_object
from rlcore_kit.worker.process import WorkerFailure
from rlcore_rewards.forms import prepare

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
    try:
        function = cloudpickle.loads(Path(home).read_bytes()) if home.endswith(PICKLE) else load_object(home, name)
    except ConfigError as error:
        raise WorkerFailure("startup", str(error)) from None
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
