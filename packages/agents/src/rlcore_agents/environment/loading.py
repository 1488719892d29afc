"""Loading the class or function that `PythonEnvironmentSettings.path` names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import ConfigError
from rlcore.object_path import existing_file, load_object
from rlcore_agents.environment.checks import short
from rlcore_agents.environment.environment import Environment
from rlcore_agents.environment.play import Program
from rlcore_agents.environment.settings import PythonEnvironmentSettings


def load_program(options: PythonEnvironmentSettings) -> Program:
    """Import the class or function of an environment.

    Raises:
        ConfigError: it does not exist, its file cannot be imported, or it cannot be called as environments are.
    """
    code, name = load_callable(options.path, "environment"), options.path.rpartition(":")[2]
    try:
        _check(code, name, options.kwargs)
    except ConfigError as error:
        raise ConfigError(f"environment {options.path!r}: {error}") from None
    return Program(name, code, options.kwargs, options.max_observation_chars)


def load_callable(path: str, what: str) -> Callable[..., Any]:
    """Import the class or function at ``path``; ``what`` says what it is, for messages.

    Raises:
        ConfigError: it does not exist, its file cannot be imported, or it is something else.
    """
    home, _, name = path.rpartition(":")
    try:
        if home.endswith(".py"):
            existing_file(home)
        with boundary("importing it fails", ConfigError):
            found = load_object(home, name)
    except ConfigError as error:
        raise ConfigError(f"{what} {path!r}: {error}") from None
    if not callable(found):
        raise ConfigError(f"{what} {path!r}: {name} is {short(found)}, neither a class nor a function")
    return found  # type: ignore[no-any-return]


def _check(code: Any, name: str, kwargs: dict[str, Any]) -> None:
    arguments: tuple[Any, ...] = (None, None)
    form = "a function of an environment takes a chat and a sample"
    if isinstance(code, type):
        if not issubclass(code, Environment):
            raise ConfigError(f"{name} is not a subclass of rlcore_agents.Environment")
        if missing := sorted(getattr(code, "__abstractmethods__", ())):
            raise ConfigError(f"{name} lacks {' and '.join(missing)}")
        arguments, form = (), "the class is made with rollout.environment.kwargs"
    signature = inspect.signature(code)
    try:
        signature.bind(*arguments, **kwargs)
    except TypeError as error:
        given = f" with kwargs {sorted(kwargs)}" if kwargs else ""
        raise ConfigError(f"{form}, but {name}{signature} cannot be called{given}: {error}") from None
