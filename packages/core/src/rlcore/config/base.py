"""The base of every configuration model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema


class Config(BaseModel):
    """Unknown keys are errors, defaults stand in one place, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Every illegal combination of values, as ``(dotted key below this model, what is wrong)``.

        Override it instead of writing a pydantic validator that stops at its first problem: all pairs are reported
        together. It is called once every value is valid on its own.
        """
        return iter(())

    @model_validator(mode="wrap")
    @classmethod
    def _collect_problems(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
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
    """The error for a key that a model does not have, with the keys it might have been."""
    names = list(known)
    close = get_close_matches(key, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(names) or 'none'}"
    return PydanticCustomError("unknown_key", _literal(f"unknown key; {hint}"))


def json_schema(model: type[BaseModel], handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    """The JSON Schema of ``model`` inside of another model's; the outer definitions collect its own."""
    # a handler called with a schema passes over that schema's own hooks, but not over those of a schema inside it
    return handler(core_schema.definitions_schema(model.__pydantic_core_schema__, []))


def _is_unknown_key(detail: Any) -> bool:
    """An unknown key of this very model: those of inner models were replaced when they were validated."""
    return detail["type"] == "extra_forbidden" and len(detail["loc"]) == 1


def _hinted(detail: Any, known: Iterable[str]) -> InitErrorDetails:
    kind = (
        unknown_key(str(detail["loc"][0]), known)
        if _is_unknown_key(detail)
        else PydanticCustomError(detail["type"], _literal(detail["msg"]))
    )
    return InitErrorDetails(type=kind, loc=detail["loc"], input=detail["input"])


def _literal(text: str) -> Any:
    """A message that holds values, where pydantic's types ask for a constant template; it is used as it stands."""
    return text
