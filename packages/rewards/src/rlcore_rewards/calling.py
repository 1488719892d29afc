"""Find a user's reward function and call it; imported in workers only."""

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

from rlcore.engines.reward import RewardSample
from rlcore.suggestions import functions_of
from rlcore_rewards.reply import WorkerFailure

KEYWORDS: dict[str, Callable[[RewardSample], Any]] = {
    "data_source": lambda sample: sample.data_source,
    "solution_str": lambda sample: sample.completion,
    "ground_truth": lambda sample: sample.ground_truth,
    "extra_info": lambda sample: _extra_info(sample.extra),
}
"""The keyword arguments of verl's ``compute_score``, and their values from a sample."""

BATCHED = ("completions", "prompts")
"""First parameters of functions that score a list of samples in one call."""


def load(options: Mapping[str, Any]) -> Callable[[RewardSample], Any]:
    """Return the function ``name`` in the file or module ``home``, ready to be called with a sample.

    It takes either some of `KEYWORDS` by name, ``solution_str`` among them, or one `RewardSample`, plus ``kwargs``.
    It may be a coroutine function; all calls share one event loop.

    Raises:
        WorkerFailure: the function does not exist or takes other arguments.
    """
    home, name, kwargs = options["home"], options["name"], options["kwargs"]
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
    sys.path.insert(0, str(file.parent))  # modules of its folder can be imported, as in a script
    spec = spec_from_file_location(f"reward_function_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up the module of a class
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
    except ValueError:  # some functions written in C have none
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
            f"it must take {', '.join(KEYWORDS)} as keyword arguments (those it needs, at least solution_str) or one "
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
    """Return the data file's remaining fields; the fields of its column ``extra_info``, if any, on the same level."""
    nested = extra.get("extra_info")
    if not isinstance(nested, Mapping):
        return dict(extra)
    return {**{key: value for key, value in extra.items() if key != "extra_info"}, **nested}
