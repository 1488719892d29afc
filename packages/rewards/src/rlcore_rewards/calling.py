"""Load and call a user's reward function; imported in workers only."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial, reduce
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from rlcore.engines.reward import RewardSample
from rlcore.suggestions import functions_of
from rlcore_rewards.reply import WorkerFailure

KEYWORDS: dict[str, Callable[[RewardSample], Any]] = {
    "data_source": lambda sample: sample.data_source,
    "solution_str": lambda sample: sample.completion,
    "ground_truth": lambda sample: sample.ground_truth,
    "extra_info": lambda sample: _extra_info(sample.extra),
}
"""The keyword arguments of verl's ``compute_score``, as functions of a sample."""

PICKLE = ".pickle"
"""Ending of a file that holds a function, written by cloudpickle."""

BATCHED = ("completions", "prompts")
"""First parameters of functions that score a list of samples, such as TRL's."""


def load(options: Mapping[str, Any]) -> Callable[[RewardSample], Any]:
    """Load a user's function and return a function that calls it with a sample.

    The user's function takes either some of `KEYWORDS` by name, ``solution_str`` among them, or one `RewardSample`,
    and in addition ``kwargs``. It may be a coroutine function; all calls share one event loop.

    Args:
        options: ``home`` (a file or module), ``name`` of the function in it, and ``kwargs``. A file that ends with
            `PICKLE` holds the function itself.

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
    call = _adapt(function, kwargs)
    runner = asyncio.Runner()

    async def wait(value: Awaitable[Any]) -> Any:
        return await value

    def score(sample: RewardSample) -> Any:
        value = call(sample)
        return runner.run(wait(value)) if inspect.isawaitable(value) else value

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


def _adapt(function: Callable[..., Any], kwargs: dict[str, Any]) -> Callable[[RewardSample], Any]:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return lambda sample: function(sample, **kwargs)
    parameters = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    by_keyword = "solution_str" in parameters
    if next(iter(parameters), None) in BATCHED:
        raise WorkerFailure(
            "startup",
            f"{_name_of(function)}{signature} takes lists of samples, as TRL's reward functions do; it must take one "
            f"sample: {', '.join(KEYWORDS)} as keyword arguments, or one RewardSample",
        )
    bound = function.keywords if isinstance(function, partial) else {}  # set by the user
    wanted = [name for name in KEYWORDS if name not in bound and (takes_any or name in parameters)]
    wanted = wanted if by_keyword else []
    try:
        signature.bind(*([] if by_keyword else [None]), **dict.fromkeys(wanted), **kwargs)
    except TypeError as error:
        raise WorkerFailure(
            "startup",
            f"it must take keyword arguments among {', '.join(KEYWORDS)} (at least solution_str) or one "
            f"RewardSample, but {_name_of(function)}{signature} cannot be called in this way"
            f"{f' with kwargs {sorted(kwargs)}' if kwargs else ''}: {error}",
        ) from None
    if by_keyword:
        return lambda sample: function(**{name: KEYWORDS[name](sample) for name in wanted}, **kwargs)
    return lambda sample: function(sample, **kwargs)


def _name_of(function: Callable[..., Any]) -> str:
    """Return a name for messages: of the function in a partial object, of the class of a callable object."""
    if isinstance(function, partial):
        return _name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _extra_info(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the remaining fields of the data file; merge those of its column ``extra_info``, if it has one."""
    nested = extra.get("extra_info")
    if not isinstance(nested, Mapping):
        return dict(extra)
    return {**{key: value for key, value in extra.items() if key != "extra_info"}, **nested}
