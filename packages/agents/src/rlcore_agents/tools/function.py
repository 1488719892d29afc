"""Tools made of Python functions: the signature becomes a JSON schema, and arguments are validated against it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from rlcore.boundary import boundary
from rlcore.errors import ConfigError
from rlcore_agents.tools.thread import in_thread
from rlcore_agents.tools.tool import MAX_CHARACTERS, TIMEOUT_S, BadArguments, Tool

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
"""What OpenAI's protocol allows as a name of a function."""


def function_tool(
    function: Callable[..., Any],
    *,
    name: str = "",
    description: str = "",
    timeout_s: float = TIMEOUT_S,
    max_characters: int = MAX_CHARACTERS,
) -> Tool:
    """Return ``function`` as a tool; arguments are converted to the types of its parameters.

    A function that is no coroutine function runs in a thread. Parameters are described by
    ``Annotated[int, pydantic.Field(description="…")]``.

    Args:
        function: a function, a method, or an object that can be called; every parameter has a type hint.
        name: "": that of the function, or of the object's class in snake case.
        description: "": the docstring.

    Raises:
        ConfigError: the signature or the name cannot be that of a tool, or there is no description.
    """
    called = function if inspect.isroutine(function) else type(function).__call__.__get__(function)
    name = name or (function.__name__ if inspect.isroutine(function) else _snake_case(type(function).__name__))
    description = description or inspect.cleandoc(function.__doc__ or called.__doc__ or "")
    if not NAME.fullmatch(name):
        raise ConfigError(f"tool name {name!r} must have at most 64 letters, digits, '_' and '-'")
    if not description:
        raise ConfigError(f"tool {name!r} has no docstring, which would tell the model what it does")
    parameters, arguments_of = _signature(called, name)
    is_coroutine = inspect.iscoroutinefunction(called)

    async def call(values: dict[str, Any]) -> Any:
        args, kwargs = arguments_of(values)
        result = called(*args, **kwargs) if is_coroutine else await in_thread(lambda: called(*args, **kwargs))
        return await result if inspect.isawaitable(result) else result

    return Tool(name, description, parameters, call, timeout_s, max_characters)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _signature(
    function: Callable[..., Any], name: str
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Return the JSON schema of the arguments, and the function that validates and converts them."""
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ConfigError(f"tool {name!r}: parameter {parameter.name!r} cannot be passed by name")
        if parameter.annotation is parameter.empty:
            raise ConfigError(f"tool {name!r}: parameter {parameter.name!r} has no type hint")

    @wraps(function)
    def bound(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    with boundary(f"tool {name!r}: the type hints make no JSON schema", ConfigError):
        # pydantic looks names up in the module of that name, which code that was executed need not have
        bound.__annotations__ = get_type_hints(function, include_extras=True)
        adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, bound))
        schema = _without_titles(adapter.json_schema())

    def arguments_of(values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            return adapter.validate_python(ArgsKwargs((), values))  # type: ignore[no-any-return]
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False, include_context=False)
            raise BadArguments(
                "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
            ) from None

    return {"type": "object", "properties": {}, **schema}, arguments_of


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema without the titles that pydantic derives from names: they cost tokens and say nothing."""
    cleaned: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            cleaned[key] = {name: _without_titles(inner) for name, inner in value.items()}
        elif isinstance(value, dict):
            cleaned[key] = _without_titles(value) if key != "default" else value
        elif isinstance(value, list) and key in ("anyOf", "allOf", "oneOf", "prefixItems"):
            cleaned[key] = [_without_titles(inner) for inner in value]
        elif key != "title":
            cleaned[key] = value
    return cleaned
