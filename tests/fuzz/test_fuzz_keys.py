"""Every configuration key of every recipe, with odd values."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from typing import Any

import pytest

from fuzz import ALL, chosen
from fuzz.commands import LONGEST_ERROR
from rlcore import plugins
from rlcore.config import Config, dump_config, load_config, validate_config
from rlcore.config.keys import sections
from rlcore.config.yaml_format import parse
from rlcore.errors import ConfigError

PER_RECIPE = 1000
"""Cases per recipe in the default run."""
LARGEST_INTEGER = 2**63 - 1

REQUIRED: Mapping[str, Mapping[str, Any]] = {
    recipe: {
        "model": {"path": "model"},
        "data": {"train_files": ["train.parquet"], "val_files": ["test.parquet"], **data},
        "trainer": {"out_dir": "out"},
        **rest,
    }
    for recipe, data, rest in [
        ("sft", {}, {}),
        *(
            (name, {"max_prompt_length": 8, "max_response_length": 8}, {"reward": {"name": "gsm8k"}})
            for name in ("grpo", "ppo", "dapo")
        ),
    ]
}
WRITTEN = [
    "", "null", "~", "true", "-1", "0", "1", "0.5", "1e400", "-0.0", ".nan", ".inf", "-.inf", "9223372036854775808",
    "1" + "0" * 30, "1" * 5000, "0x10", "1_000", "x", "''", "' '", '"a\\0b"', '"\\ud800"', "'a # b'", "a: b", "- a",
    "[]", "[1]", "[x, x]", "[null]", "['']", "[[[]]]", "{}", "{a: 1}", "{name: x}", "{1: 2}", "{null: 1}", "&a x", "*a",
    "!x y", "!!binary aGk=", "!!python/object/apply:os.getpid []", "2020-01-01", "[" * 1000, "x" * 100_000,
    "é\u2028\u202e", "~x/y", "$HOME/x", "s3://b/a", "../..", "/dev/zero", "\x07", "a\nb", "%", "@x", "`x`", "<<: x",
]  # fmt: skip
GIVEN: list[Any] = [
    None, True, -1, 0, 1, 0.5, math.nan, math.inf, -math.inf, 2**63, 10**30, "", "x", b"x", date(2020, 1, 1), [], [1],
    [None], [b"x"], [[]], {}, {"a": 1}, {"name": None}, {"name": ["x"]}, {1: 2}, {None: 1}, {b"x": 1}, {"": ""}, {"x"},
    {"name": "x", "name ": 1}, "x" * 100_000, 1e39, -0.0, "\ud800", "\0",
]  # fmt: skip


def keys(recipe: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Every key that can be set alone, and the choices that must be made for it."""
    for section in sections(plugins.get("rlcore.recipes", recipe).config_class()):
        if "[]" in section.path:
            continue
        path = section.path.replace("<name>", "x")
        choice = re.match(r"with (\S+)=(\w+):", section.description)
        needed = {f"{choice[1]}.name": choice[2]} if choice else {}
        if path:
            yield path, needed
        for key in section.keys:
            yield f"{path}.{key.name}" if path else key.name, needed


def written(model: type[Config], recipe: str, key: str, needed: dict[str, str], index: int) -> Config:
    """The value on the command line."""
    overrides = [f"{name}={value}" for name, value in _flat(REQUIRED[recipe])]
    overrides += [f"{name}={value}" for name, value in needed.items()]
    return load_config(model, None, [*overrides, f"{key}={WRITTEN[index]}"])


def given(model: type[Config], recipe: str, key: str, needed: dict[str, str], index: int) -> Config:
    """The value as a file may hold it."""
    values: Any = {}
    for name, value in [*_flat(REQUIRED[recipe]), *needed.items(), (key, GIVEN[index])]:
        place = values
        *parents, leaf = name.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return validate_config(model, values)


WAYS: dict[str, tuple[Callable[..., Config], list[Any]]] = {"written": (written, WRITTEN), "given": (given, GIVEN)}


@pytest.mark.timeout(0 if ALL else 900)
@pytest.mark.parametrize("recipe", REQUIRED)
def test_an_odd_value_is_taken_as_it_is_or_refused_in_one_error(recipe: str) -> None:
    model = plugins.get("rlcore.recipes", recipe).config_class()
    cases = {
        f"{key} {way} {index}": (way, key, needed, index)
        for key, needed in keys(recipe)
        for way, (_, values) in WAYS.items()
        for index in range(len(values))
    }
    faults = []
    for name in chosen(cases, PER_RECIPE):
        way, key, needed, index = cases[name]
        function, values = WAYS[way]
        if problem := fault(model, lambda f=function, k=key, n=needed, i=index: f(model, recipe, k, n, i)):
            faults.append(f"{key}={values[index]!r:.80} ({way}): {problem}")
    assert not faults, f"{len(faults)} of {len(cases)} values:\n" + "\n".join(faults[:50])


def fault(model: type[Config], load: Callable[[], Config]) -> str | None:
    """What is wrong with how a configuration is taken; None where nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = load()
    except ConfigError as error:
        return f"its error has {len(str(error))} characters" if len(str(error)) > LONGEST_ERROR else None
    except Exception as error:
        return f"raised {type(error).__name__}: {error!s:.200}"
    dumped = dump_config(config)
    values = parse(dumped, "dump")[0]
    for key, value in _flat(values):
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            return f"{key} became {value}"
        if isinstance(value, float) and not math.isfinite(value) and not says_infinity(config, key):
            return f"{key} became {value}"
    try:
        same = validate_config(model, values) == config
    except ConfigError as error:
        return f"cannot be loaded from what it is dumped as: {error!s:.300}"
    return None if same else "it changes when it is dumped and loaded"


def says_infinity(config: Config, key: str) -> bool:
    """Whether the description of a key says what infinity means there."""
    *parents, leaf = key.split(".")
    place: Any = config
    for parent in parents:
        place = place[parent] if isinstance(place, Mapping) else getattr(place, parent)
        place = getattr(place, "params", place)  # of a choice
    return isinstance(place, Config) and ".inf" in (type(place).model_fields[leaf].description or "")


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
