"""Fields whose shape depends on a name: a registered algorithm, or a plugin with a section of its own."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from rlcore.config.base import Config
from rlcore.errors import PluginError

if TYPE_CHECKING:
    from rlcore.registry import Entry, Registry


class Choice:
    """A registered function and its parameters: ``grpo``, or ``{name: grpo, normalize_std: false}``.

    Declare a field with ``Annotated[Choice, Chosen(registry)]`` and a plain name (or mapping) as default.
    """

    __slots__ = ("entry", "params")

    def __init__(self, entry: Entry[Any], params: Config) -> None:
        self.entry = entry
        self.params = params

    @property
    def name(self) -> str:
        return self.entry.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with its parameters as last positional argument."""
        return self.entry.function(*args, self.params, **kwargs)

    def __repr__(self) -> str:
        return f"Choice({self.dump()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self.dump() == other.dump()

    def __hash__(self) -> int:
        return hash(self.name)

    def dump(self) -> dict[str, Any]:
        return {"name": self.name, **self.params.model_dump(mode="json")}

    def __reduce__(self) -> Any:
        return _rebuild, (self.entry.kind, self.entry.function.__module__, self.name, self.params)


def _rebuild(kind: str, module: str, name: str, params: Config) -> Choice:
    """Unpickle by name: functions stay where they are registered, on every worker."""
    from importlib import import_module

    from rlcore.registry import registry_of_kind

    import_module(module)
    return Choice(registry_of_kind(kind).get(name), params)


class Chosen:
    """Annotation that ties a `Choice` field to its registry."""

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda choice: choice.dump()),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        variants: list[dict[str, Any]] = [{"enum": [entry.name for entry in self.registry], "type": "string"}]
        for entry in self.registry:
            params = entry.params.model_json_schema()
            variants.append(
                {
                    "type": "object",
                    "description": entry.summary,
                    "properties": {"name": {"const": entry.name}, **params.get("properties", {})},
                    "required": ["name"],
                    "additionalProperties": False,
                }
            )
        return {"anyOf": variants}

    def _validate(self, value: Any) -> Choice:
        if isinstance(value, Choice):
            return value
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise PydanticCustomError(
                "choice",
                "expected the name of one {kind}, or a mapping with 'name' and its parameters",
                {"kind": self.registry.kind},
            )
        try:
            entry = self.registry.get(given["name"])
        except PluginError as error:
            raise PydanticCustomError("choice", "{reason}", {"reason": str(error)}) from None
        return Choice(entry, entry.params.model_validate({k: v for k, v in given.items() if k != "name"}))


class PluginSections(Config):
    """A model that names one plugin and holds a section per plugin: ``{engine: fsdp, fsdp: {...}}``.

    Subclasses set ``plugin_group`` and ``plugin_field``. Sections of other installed plugins may stand beside it (to
    switch by one word); they are validated too. Use `options` for the chosen plugin's section.
    """

    model_config = ConfigDict(extra="allow")
    plugin_group: ClassVar[str]
    plugin_field: ClassVar[str] = "engine"

    @property
    def options(self) -> Config:
        """The chosen plugin's own settings."""
        return (self.__pydantic_extra__ or {})[getattr(self, self.plugin_field)]  # type: ignore[no-any-return]

    @model_validator(mode="after")
    def _validate_sections(self) -> PluginSections:
        from rlcore import plugins

        chosen = getattr(self, self.plugin_field)
        extra = self.__pydantic_extra__ if self.__pydantic_extra__ is not None else {}
        installed = plugins.names(self.plugin_group)
        for name in extra:
            if name not in installed:
                fields = [*type(self).model_fields, *installed]
                close = get_close_matches(name, fields, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(fields)}"
                raise PydanticCustomError("unknown_key", "unknown key {key}; {hint}", {"key": repr(name), "hint": hint})
        for name in dict.fromkeys([chosen, *extra]):
            section = extra.get(name, {})
            try:
                model = plugins.get(self.plugin_group, name).config_class()
            except PluginError as error:
                raise PydanticCustomError("plugin", "{reason}", {"reason": str(error)}) from None
            extra[name] = section if isinstance(section, BaseModel) else model.model_validate(section)
        return self

    @model_serializer(mode="wrap")
    def _dump_sections(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped = handler(self)
        for name, section in (self.__pydantic_extra__ or {}).items():
            dumped[name] = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
        return dumped  # type: ignore[no-any-return]
