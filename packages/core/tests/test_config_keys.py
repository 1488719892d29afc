"""What help and editors show of a model: keys, types, defaults, JSON Schema."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from rlcore.config import Algorithm, AlgorithmField, Config, PluginSections
from rlcore.config.keys import Key, Section, sections
from rlcore.config.registry import Registry

metals: Registry = Registry("test metal")


class IronParams(Config):
    weight: int = Field(1, gt=0, description="Kilograms.")


@metals.register("iron", params=IronParams)
def iron(params):
    """Heavy."""


@metals.register("tin")
def tin(params): ...


class Optim(Config):
    """Optimizer."""

    lr: float = Field(1e-6, gt=0, le=1, description="Rate.")


class Nested(PluginSections):
    """May hold its own kind."""

    plugin_group = "rlcore.train_engines"
    engine: str = "acme"


class Run(Config):
    """A run."""

    path: Path = Field(description="Where.")
    names: list[str] = Field([], description="Names.")
    pair: tuple[float, float] = (0.0, 1.0)
    mode: Literal["a", "b"] | None = None
    limit: int | None = Field(None, ge=1)
    extra: dict[str, Any] = Field({})
    metal: Annotated[Algorithm, AlgorithmField(metals)] = "tin"
    optim: Optim = Field(Optim(lr=0.5), description="The actor's.")
    other: Optim | None = Field(None, description="May be missing.")
    required: Optim
    pools: dict[str, Optim] = Field({})
    stages: list[Optim] = Field([])
    engine: Nested = Field(default_factory=Nested)


SETTINGS = """
from rlcore.config import Config, PluginSections
from rlcore.plugins import Plugin

class Inner(Config):
    size: int = 2

class Settings(PluginSections):
    '''Acme's settings.'''
    plugin_group = "rlcore.train_engines"
    engine: str | None = None
    inner: Inner = Inner()

acme = Plugin(interface=1, config="acme_plugin:Settings", factory="acme_plugin:Settings")
"""


@pytest.fixture(autouse=True)
def engines(distribution):
    points = {"rlcore.train_engines": {"acme": "acme_plugin:acme", "bad": "acme_gone:x"}}
    distribution("acme-engines", points, {"acme_plugin": SETTINGS})


@pytest.fixture
def found() -> dict[str, Section]:
    return {section.path: section for section in sections(Run)}


def test_keys_of_the_top_level(found):
    assert found[""].description == "A run."
    assert found[""].keys == [
        Key("path", "path", None, "Where."),
        Key("names", "list of text", "[]", "Names."),
        Key("pair", "list of float, float", "[0.0, 1.0]", ""),
        Key("mode", "a | b | null", "null", ""),
        Key("limit", "int ≥ 1 | null", "null", ""),
        Key("extra", "mapping of text, any", "{}", ""),
        Key("metal", "iron | tin", "tin", ""),
        Key("other", "keys | null", "null", "May be missing."),
        Key("pools", "mapping of text, keys", "{}", ""),
        Key("stages", "list of keys", "[]", ""),
    ]


def test_inner_models(found):
    assert found["optim"] == Section("optim", "The actor's.", [Key("lr", "float > 0 and ≤ 1", "0.5", "Rate.")])
    for path in ("other", "required", "pools.<name>", "stages[]"):
        assert found[path].keys == [Key("lr", "float > 0 and ≤ 1", "1.0e-06", "Rate.")], path


def test_parameters_of_choices(found):
    assert found["metal"] == Section("metal", "with metal=iron: Heavy.", [Key("weight", "int > 0", "1", "Kilograms.")])


def test_plugin_sections_and_those_that_do_not_work(found):
    assert found["engine.acme"].description == "Acme's settings."
    assert found["engine.acme.inner"].keys == [Key("size", "int", "2", "")]
    assert found["engine.bad"].keys == []
    assert "cannot be imported" in found["engine.bad"].description


def test_keys_do_not_need_the_default_plugin(monkeypatch):
    monkeypatch.setattr("rlcore.plugins._points", lambda group: {})
    found = {section.path: section for section in sections(Run)}
    assert found["engine"].keys == [Key("engine", "text", "acme", "")]


def resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    return root["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def test_json_schema_has_choices_and_plugin_sections():
    root = json.loads(json.dumps(Run.model_json_schema()))
    assert root["required"] == ["path", "required"]
    assert root["additionalProperties"] is False
    names, iron, tin = root["properties"]["metal"]["anyOf"]
    assert names == {"type": "string", "enum": ["iron", "tin"]}
    assert iron["properties"]["name"] == {"const": "iron"}
    assert iron["properties"]["weight"]["exclusiveMinimum"] == 0
    assert tin["properties"] == {"name": {"const": "tin"}}

    engine = resolved(root["properties"]["engine"], root)
    assert engine["additionalProperties"] is False
    acme = resolved(engine["properties"]["acme"]["anyOf"][0], root)
    assert resolved(acme["properties"]["inner"], root)["properties"]["size"]["default"] == 2
    assert acme["properties"]["acme"]["type"] == ["object", "null"], "a plugin that holds its own kind ends there"
    assert "bad" not in engine["properties"]


def test_json_schema_of_the_serialized_form_works_too():
    assert "metal" in Run.model_json_schema(mode="serialization")["properties"]
