"""Models that name a plugin and hold a section of settings for each plugin."""

# Without postponed annotations: pydantic below 2.13 looks for the names in an inherited `__pydantic_extra__` in the
# subclass's module, where they are missing.

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, cast

from pydantic import (
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from rlcore import plugins
from rlcore.config.base import Config, json_schema, unknown_key
from rlcore.errors import PluginError

# sections whose JSON schema is being made: one may hold plugins of the same group (a reward made of rewards)
_within: ContextVar[frozenset[type[Config]]] = ContextVar("_within", default=frozenset())


class _Section:
    """A section on its way to validation, with what is needed to validate it."""

    def __init__(self, value: Any, model: type[Config] | PydanticCustomError) -> None:
        self.value = value
        self.model = model

    def validate(self) -> Config:
        if isinstance(self.model, PydanticCustomError):
            raise self.model
        return self.model.model_validate({} if self.value is None else self.value)


class PluginSections(Config):
    """A model that names a plugin and holds a section per plugin: ``{engine: fsdp, fsdp: {...}}``.

    Subclasses set ``plugin_group`` and ``plugin_field``; that field holds one name, None, or several names. Sections of
    other installed plugins may be present too (to switch by one word); they are validated too.
    """

    model_config = ConfigDict(extra="allow")
    # pydantic validates every key that is no field with this type, in the same pass as the fields
    __pydantic_extra__: dict[str, Annotated[Any, PlainValidator(_Section.validate)]]
    plugin_group: ClassVar[str]
    plugin_field: ClassVar[str] = "engine"

    @property
    def options(self) -> Config:
        """The settings of the plugin that is named, where one is."""
        return self.options_of(getattr(self, self.plugin_field))

    def options_of(self, name: str) -> Config:
        """Return the settings of plugin ``name``, which is named or has a section."""
        return cast(Config, (self.__pydantic_extra__ or {})[name])

    @property
    def named(self) -> list[str]:
        """The plugins that are named."""
        return _names(getattr(self, self.plugin_field))

    @classmethod
    def section_model(cls, name: str) -> type[Config]:
        """Return the model of plugin ``name``'s section.

        Raises:
            PluginError: it is not installed or cannot be imported.
        """
        return plugins.get(cls.plugin_group, name).config_class()

    @model_validator(mode="before")
    @classmethod
    def _find_sections(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = plugins.names(cls.plugin_group)
        named = data[cls.plugin_field] if cls.plugin_field in data else _default(cls, cls.plugin_field)
        # keys that are no text are left to pydantic, which refuses them
        found = {key: value for key, value in data.items() if key in cls.model_fields or not isinstance(key, str)}
        for name in dict.fromkeys([*_names(named), *data]):
            if name in cls.model_fields or name in found:
                continue
            model: type[Config] | PydanticCustomError
            if name in known or plugins.is_ours(cls.plugin_group, name):
                try:
                    model = cls.section_model(name)
                except PluginError as error:
                    model = PydanticCustomError("plugin", "{reason}", {"reason": str(error)})
            else:
                model = unknown_key(name, [*cls.model_fields, *known])
            if name in data or not isinstance(model, PydanticCustomError):  # otherwise the plugin field's own error
                found[name] = _Section(data.get(name), model)
        return found

    @field_validator("*")
    @classmethod
    def _check_names(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == cls.plugin_field:
            for name in _names(value):
                try:
                    cls.section_model(name)
                except PluginError as error:
                    raise PydanticCustomError("plugin", "{reason}", {"reason": str(error)}) from None
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = super().__get_pydantic_json_schema__(core_schema, handler)
        schema = handler.resolve_ref_schema(reference)
        for name in plugins.names(cls.plugin_group):
            try:
                model = cls.section_model(name)
            except PluginError:
                continue  # `rlcore plugins` says why; the other sections stay useful to an editor
            if model in (within := _within.get()):
                see = f"See {model.__name__} above."
                schema["properties"][name] = {"type": ["object", "null"], "description": see}
                continue
            token = _within.set(within | {model})
            short = [schema["properties"][name]] if name in cls.short_forms else []
            schema["properties"][name] = {"anyOf": [json_schema(model, handler), {"type": "null"}, *short]}
            _within.reset(token)
        schema["additionalProperties"] = False
        return reference


class PluginName:
    """Annotation of a text field that names a plugin: ``Annotated[str, PluginName("rlcore.executors")]``.

    The name of a plugin that is unknown or not installed is an error, with close matches or what to install.
    """

    def __init__(self, group: str) -> None:
        self.group = group

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "enum": plugins.names(self.group)}

    def _check(self, name: str) -> str:
        try:
            plugins.get(self.group, name)
        except PluginError as error:
            raise PydanticCustomError("plugin", "{reason}", {"reason": str(error)}) from None
        return name


def _default(model: type[Config], field: str) -> Any:
    return model.model_fields[field].get_default(call_default_factory=True)


def _names(value: Any) -> list[str]:
    """Return the plugin names in the value of a plugin field; none where it is not valid."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [name for name in values if isinstance(name, str)]
