"""The base of every configuration model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, Self
from warnings import warn

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from rlcore.config.values import has_bytes, is_list, out_of_range, reinterpreted, unusable
from rlcore.errors import RlcoreWarning
from rlcore.packages import Package

LONGEST_NAME = 100
"""Characters of a key or value that messages repeat."""


@dataclass(frozen=True)
class ShortForm:
    """A key that is written in place of others.

    Attributes:
        key: the dotted key, below the same model, that takes the value.
        sets: further keys, and the text that each is set to.
    """

    key: str
    sets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ForeignKey:
    """A key of another framework, and what it is here.

    Attributes:
        framework: its name.
        name: the key's name there.
        ours: dotted keys that do the same; empty if there is none.
        remark: how values differ, or why there is no key.
    """

    framework: str
    name: str
    ours: tuple[str, ...]
    remark: str = ""


class Config(BaseModel):
    """Base class: unknown keys are errors, defaults are in one place, values never change after validation.

    Floats are finite unless the field's type is `Unlimited`, integers have at most 31 bits unless the field sets an
    upper bound, and a single value is accepted for a list.

    Attributes:
        short_forms: keys that are replaced in each source separately, before the sources are merged.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # what is off stays off when it is written and read again
    )
    short_forms: ClassVar[Mapping[str, ShortForm]] = {}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield every illegal combination of values, as ``(dotted key below this model, what is wrong)``.

        Override it instead of writing a pydantic validator that stops at its first problem: all pairs are reported
        together. It is called once every value is valid on its own.
        """
        return iter(())

    def doubts(self) -> Iterator[tuple[str, str]]:
        """Yield combinations of values that are legal but almost certainly a mistake, as ``(dotted key, why)``.

        Only the model of a whole run is asked.
        """
        return iter(())

    def warn_of_doubts(self) -> None:
        """Warn of each of `doubts`, once in a process."""
        for key, why in self.doubts():
            warn(f"{key}: {why}", RlcoreWarning, stacklevel=1)  # one place for all callers: Python shows each text once

    def packages(self) -> Iterator[tuple[str, Package]]:
        """Yield the optional packages that these values need, as ``(dotted key below this model, package)``.

        Inner models are asked by themselves. Before a run, every package is looked for; see `missing_packages`.
        """
        return iter(())

    @classmethod
    def foreign_keys(cls, name: str) -> Iterator[ForeignKey]:
        """Yield what other frameworks mean by the unknown dotted key ``name``.

        Only the model of a whole run is asked.
        """
        return iter(())

    @classmethod
    def from_text(cls, text: str) -> Mapping[str, Any] | None:
        """Return the values that ``text`` in the place of a mapping means; None: it must be a mapping."""
        return None

    @classmethod
    def spelled_out(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``given`` with short forms replaced. A mapping is no short form: it is a section of that name.

        Raises:
            ValueError: a key that a short form sets has another value here, or its parent is not a mapping.
        """
        values = dict(given)
        for name, form in cls.short_forms.items():
            if name not in values or isinstance(values[name], (Mapping, Config)):
                continue
            value = values.pop(name)
            for key, text in form.sets.items():
                if values.setdefault(key, text) != text:
                    raise ValueError(f"{name} is short for {form.key} with {key}={text}, but {key} is {values[key]!r}")
            *parents, last = form.key.split(".")
            place = values
            for parent in parents:
                inner = place.get(parent) or {}
                if isinstance(inner, Config):
                    inner = inner.model_dump(mode="json")
                if not isinstance(inner, Mapping):
                    raise ValueError(f"{name} is short for {form.key}, but {parent} is not a mapping")
                place[parent] = dict(inner)
                place = place[parent]
            place[last] = value
        return values

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        reference = handler(schema)
        properties = handler.resolve_ref_schema(reference).get("properties", {})
        for name, form in cls.short_forms.items():
            sets = "".join(f"{key}={text} " for key, text in form.sets.items())
            properties[name] = {"type": "string", "description": f"Short for {sets}{form.key}=…"}
        return reference

    @field_validator("*", mode="before")
    @classmethod
    def _accept(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if has_bytes(value):
            raise PydanticCustomError("unusable", "must not be bytes")
        if isinstance(value, (str, int, float)) and is_list(annotation):
            value = [value]
        if problem := reinterpreted(value, annotation):
            raise PydanticCustomError("choice", _literal(problem))
        return value

    @field_validator("*")
    @classmethod
    def _bound(cls, value: Any, info: ValidationInfo) -> Any:
        if problem := unusable(value) or out_of_range(value, cls.model_fields[str(info.field_name)].metadata):
            raise PydanticCustomError("unusable", _literal(problem))
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _collect_problems(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, str):
            data = cls.from_text(data) or data
        if cls.short_forms and isinstance(data, Mapping):
            data = cls.spelled_out(data)
        try:
            config = handler(data)
        except ValidationError as error:
            details = error.errors(include_url=False)
            if not any(_is_unknown_key(detail) for detail in details):
                raise
            hinted = [_hinted(detail, cls.model_fields) for detail in details]
            raise ValidationError.from_exception_data(cls.__name__, hinted) from None
        problems = [
            InitErrorDetails(
                type=PydanticCustomError("combination", _literal(text)), loc=tuple(key.split(".")), input=data
            )
            for key, text in config.problems()
        ]
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return config


def unknown_key(key: str, known: Iterable[str]) -> PydanticCustomError:
    """Return the error for a key that a model does not have, with the keys it might have been."""
    names = list(known)
    close = get_close_matches(key[:LONGEST_NAME], names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(names) or 'none'}"
    return PydanticCustomError("unknown_key", _literal(f"unknown key; {hint}"), {"known": names})


def json_schema(model: type[BaseModel], handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    """Return the JSON Schema of ``model`` inside of another model's; the outer definitions collect its own."""
    # a handler called with a schema passes over that schema's own hooks, but not over those of a schema inside it
    return handler(core_schema.definitions_schema(model.__pydantic_core_schema__, []))


def _is_unknown_key(detail: Any) -> bool:
    """Return whether this is an unknown key of this model: those of inner models were replaced when validated."""
    return detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1


def _hinted(detail: Any, known: Iterable[str]) -> InitErrorDetails:
    kind = (
        unknown_key(str(detail["loc"][0]), known)
        if _is_unknown_key(detail)
        else PydanticCustomError(detail["type"], _literal(detail["msg"]), detail.get("ctx"))
    )
    return InitErrorDetails(type=kind, loc=detail["loc"], input=detail["input"])


def _literal(text: str) -> Any:
    """Return ``text`` unchanged: pydantic's types ask for a constant template, and it holds values."""
    return text
