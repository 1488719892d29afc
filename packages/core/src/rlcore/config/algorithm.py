"""Fields that hold a registered algorithm and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from rlcore.config.base import Config, json_schema
from rlcore.config.registry import Entry, Registry, registry_of_kind
from rlcore.errors import PluginError


class Algorithm:
    """A registered function and its parameters: ``grpo``, or ``{name: grpo, normalize_std: false}``.

    Declare a field with ``Annotated[Algorithm, AlgorithmField(registry)]`` and a plain name (or mapping) as default.
    """

    __slots__ = ("entry", "params")

    def __init__(self, entry: Entry[Any], params: Config) -> None:
        self.entry = entry
        self.params = params

    @property
    def name(self) -> str:
        """The name under which the function is registered."""
        return self.entry.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with its parameters as last positional argument."""
        return self.entry.function(*args, self.params, **kwargs)

    def __repr__(self) -> str:
        return f"Algorithm({self.dump()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Algorithm) and self.dump() == other.dump()

    def __hash__(self) -> int:
        return hash(self.name)

    def dump(self) -> dict[str, Any]:
        """Return the name and the parameters, as they are written in a configuration."""
        return {"name": self.name, **self.params.model_dump(mode="json")}

    def __reduce__(self) -> Any:
        return _rebuild, (self.entry.kind, self.entry.function.__module__, self.name, self.params)


def _dump(choice: Algorithm | str) -> dict[str, Any] | str:
    """Serialise a field. Pydantic also calls this for the field's default, which is no `Algorithm` yet."""
    return choice.dump() if isinstance(choice, Algorithm) else choice


def _rebuild(kind: str, module: str, name: str, params: Config) -> Algorithm:
    """Unpickle by name: functions stay where they are registered, on every worker."""
    import_module(module)
    return Algorithm(registry_of_kind(kind).get(name), params)


class AlgorithmField:
    """Annotation that ties a `Algorithm` field to its registry."""

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(_dump),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        variants: list[dict[str, Any]] = [{"type": "string", "enum": [entry.name for entry in self.registry]}]
        for entry in self.registry:
            params = handler.resolve_ref_schema(json_schema(entry.params, handler))
            variants.append(
                {
                    "type": "object",
                    "title": entry.name,
                    "description": entry.summary,
                    "properties": {"name": {"const": entry.name}, **params.get("properties", {})},
                    "required": ["name", *params.get("required", [])],
                    "additionalProperties": False,
                }
            )
        return {"anyOf": variants}

    def _validate(self, value: Any) -> Algorithm:
        if isinstance(value, Algorithm) and value.entry.kind == self.registry.kind:
            return value
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            raise PydanticCustomError(
                "choice",
                "must be the name of one {kind}, or a mapping with 'name' and its parameters",
                {"kind": self.registry.kind},
            )
        try:
            entry = self.registry.get(given["name"])
        except PluginError as error:
            raise PydanticCustomError("choice", "{reason}", {"reason": str(error)}) from None
        # a ValidationError of the parameters passes through pydantic, which puts this field's location before theirs
        return Algorithm(entry, entry.params.model_validate({k: v for k, v in given.items() if k != "name"}))
