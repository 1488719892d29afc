"""Files, overrides, inheritance and the round trip."""

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from rlcore.config import (
    Algorithm,
    AlgorithmField,
    Config,
    PluginSections,
    Unlimited,
    dump_config,
    load_config,
    validate_config,
    yaml_format,
)
from rlcore.config.registry import Registry
from rlcore.errors import ConfigError

colours: Registry = Registry("test colour")


class RedParams(Config):
    depth: int = Field(1, gt=0)
    tint: float = 0.5


@colours.register("red", params=RedParams)
def red(value, params):
    """Red."""
    return value, params.depth


@colours.register("blue")
def blue(value, params):
    """Blue."""


class Optim(Config):
    lr: float = Field(1e-6, gt=0)
    clip: Unlimited | None = 1.0
    betas: tuple[float, float] = (0.9, 0.999)


class Engine(PluginSections):
    plugin_group = "rlcore.train_engines"
    engine: str = "acme"
    optim: Optim = Optim(lr=5e-4)


class Run(Config):
    seed: int = 0
    out: Path = Path("out")
    files: list[str] = Field([])
    extra: dict[str, int] = Field({"a": 1})
    mode: int | Literal["auto"] = "auto"
    actor: Engine = Field(default_factory=Engine)
    colour: Annotated[Algorithm, AlgorithmField(colours)] = "red"
    tint: Annotated[Algorithm, AlgorithmField(colours)] | None = None
    pools: dict[str, Optim] = Field({})


SETTINGS = """
from rlcore.config import Config
from rlcore.plugins import Plugin

class Inner(Config):
    size: int = 2

class Settings(Config):
    depth: int = 1
    inner: Inner = Inner()

class Other(Config):
    name: str = "x"

acme = Plugin(interface=1, config="acme_plugin:Settings", factory="acme_plugin:Settings", summary="Acme's engine.")
other = Plugin(interface=1, config="acme_plugin:Other", factory="acme_plugin:Other")
"""


@pytest.fixture(autouse=True)
def engines(distribution):
    points = {"rlcore.train_engines": {"acme": "acme_plugin:acme", "other": "acme_plugin:other"}}
    return distribution("acme-engines", points, {"acme_plugin": SETTINGS})


def overridden(*overrides: str) -> Run:
    return load_config(Run, overrides=overrides)


def test_defaults_without_a_file():
    config = load_config(Run)
    assert (config.seed, config.colour.name, config.actor.optim.lr) == (0, "red", 5e-4)
    assert config.actor.options.depth == 1


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("seed=3", lambda c: c.seed, 3),
        ("out=a/b c", lambda c: c.out, Path("a/b c")),
        ("files=[a, b]", lambda c: c.files, ["a", "b"]),
        ("files=[1.parquet,2.parquet]", lambda c: c.files, ["1.parquet", "2.parquet"]),
        ("files=runs/a #3.parquet", lambda c: c.files, ["runs/a #3.parquet"]),
        ("files= #### ", lambda c: c.files, [" #### "]),
        ("files='5'", lambda c: c.files, ["'5'"]),
        ("files=5", lambda c: c.files, ["5"]),
        ("mode=3", lambda c: c.mode, 3),
        ("actor.optim.lr=1e-5", lambda c: c.actor.optim.lr, 1e-5),
        ("actor.optim.clip=~", lambda c: c.actor.optim.clip, None),
        ("actor.optim.clip=null", lambda c: c.actor.optim.clip, None),
        ("actor.optim.clip=", lambda c: c.actor.optim.clip, None),
        ("actor.optim={lr: 2, clip: 3}", lambda c: c.actor.optim, Optim(lr=2, clip=3)),
        ("actor.acme.depth=4", lambda c: c.actor.options.depth, 4),
        ("actor.acme.inner.size=4", lambda c: c.actor.options.inner.size, 4),
        ("extra.b=2", lambda c: c.extra, {"b": 2}),
        ("pools.small.lr=1", lambda c: c.pools["small"].lr, 1.0),
        ("colour=blue", lambda c: c.colour.name, "blue"),
        ("colour.name=blue", lambda c: c.colour.name, "blue"),
        ("colour.depth=3", lambda c: (c.colour.name, c.colour.params.depth), ("red", 3)),
        ("tint={name: red, depth: 2}", lambda c: c.tint.params.depth, 2),
    ],
)
def test_override(override, read, expected):
    assert read(overridden(override)) == expected


def test_override_of_one_key_keeps_what_the_default_of_its_section_sets():
    config = overridden("actor.optim.clip=2")
    assert (config.actor.optim.lr, config.actor.optim.clip) == (5e-4, 2.0)


def test_the_last_override_of_a_key_wins():
    assert overridden("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("name", ["tint=red", "tint.name=red"])
def test_choice_and_its_parameters_in_any_order(name):
    for overrides in ([name, "tint.depth=7"], ["tint.depth=7", name]):
        assert overridden(*overrides).tint.params.depth == 7


def test_override_over_a_choice_given_as_a_name_in_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("colour: {name: red, tint: 0.25}\ntint: red\n")
    config = load_config(Run, tmp_path / "run.yaml", ["colour.depth=3", "tint.depth=2"])
    assert config.colour.dump() == {"name": "red", "depth": 3, "tint": 0.25}
    assert config.tint.dump() == {"name": "red", "depth": 2, "tint": 0.5}


def test_another_choice_forgets_the_parameters_of_the_first(tmp_path):
    (tmp_path / "run.yaml").write_text("colour: {name: red, tint: 0.25}\n")
    assert load_config(Run, tmp_path / "run.yaml", ["colour.name=blue"]).colour.dump() == {"name": "blue"}


def test_choice_calls_its_function_with_the_parameters():
    assert overridden("colour.depth=5").colour("value") == ("value", 5)


def test_switching_the_plugin_leaves_no_section_of_the_default_one():
    config = overridden("actor.engine=other")
    assert config.actor.model_dump(exclude={"optim"}) == {"engine": "other", "other": {"name": "x"}}


def test_sections_of_other_plugins_may_be_present():
    config = overridden("actor.other.name=y")
    assert config.actor.options.depth == 1
    assert config.actor.options_of("other").name == "y"


def test_plugin_field_with_several_names():
    class Several(PluginSections):
        plugin_group = "rlcore.train_engines"
        plugin_field = "engines"
        engines: list[str] = Field(["acme", "other"])

    config = validate_config(Several, {"acme": {"depth": 2}})
    assert (config.options_of("acme").depth, config.options_of("other").name) == (2, "x")


def test_files_inherit_and_later_ones_win(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.yaml").write_text("seed: 1\nactor: {optim: {lr: 1, clip: 1}}\n")
    (tmp_path / "base" / "b.yaml").write_text("defaults: a.yaml\nseed: 2\n")
    (tmp_path / "run.yaml").write_text("defaults: [base/a.yaml, base/b.yaml]\nactor: {optim: {clip: 3}}\n")
    config = load_config(Run, tmp_path / "run.yaml", ["actor.optim.betas=[0.5, 0.6]"])
    assert (config.seed, config.actor.optim) == (2, Optim(lr=1, clip=3, betas=(0.5, 0.6)))


def test_file_that_includes_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("defaults: b.yaml\n")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: includes itself through 'defaults'"):
        load_config(Run, tmp_path / "a.yaml")


def test_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load_config(Run, tmp_path / "run.yaml") == load_config(Run)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["seed=3", "colour.depth=4", "tint=blue", "out='1e-6'", "files=[yes, 'null', '1', '1e-6', '07', 'a: b', '']"],
        ["actor.acme.depth=4", "actor.other.name=z", "pools.a.lr=1e-9", "actor.optim.clip=.inf"],
    ],
)
def test_dump_reloads_to_an_equal_configuration(tmp_path, overrides):
    config = overridden(*overrides)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    again = load_config(Run, tmp_path / "dumped.yaml")
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_dump_is_plain_yaml():
    assert dump_config(overridden("colour.depth=2")).splitlines()[-5:] == [
        "  name: red",
        "  depth: 2",
        "  tint: 0.5",
        "tint: null",
        "pools: {}",
    ]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
def test_yaml_round_trip(value):
    assert yaml_format.parse(yaml_format.dump(value), "x")[0] == value
    assert yaml_format.parse(yaml_format.inline(value), "x")[0] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        (".inf", math.inf),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    parsed, _ = yaml_format.parse(text, "x")
    assert parsed == value
    assert type(parsed) is type(value)


def test_merge_keys_and_anchors():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert yaml_format.parse(text, "x")[0]["b"] == {"x": 1, "y": 3}
