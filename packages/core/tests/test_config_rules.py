"""Rules that hold for every key of a configuration, and what a configuration may be read from."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from rlcore.config import (
    Config,
    FileName,
    FilePath,
    Package,
    ShortForm,
    Unlimited,
    dump_config,
    load_config,
    missing_packages,
    validate_config,
)
from rlcore.config.yaml_format import parse
from rlcore.errors import ConfigError


class Function(Config):
    path: FileName | None = None
    size: int = 1


class Grader(Config):
    short_forms = {"path": ShortForm("function.path", {"name": "function"})}  # noqa: RUF012

    name: str = "exact"
    function: Function = Function()


class Judge(Config):
    """A section, and a short form of the same name."""

    short_forms = {"model": ShortForm("model.path", {"name": "model"})}  # noqa: RUF012

    name: str
    model: Function = Function()

    @classmethod
    def from_text(cls, text: str) -> dict[str, Any]:
        return {"model": text} if "/" in text else {"name": text}


class Run(Config):
    rate: float = 0.5
    cap: Unlimited = Field(2.0, gt=0)
    size: int = 1
    share: int = Field(1, le=2**40)
    note: str | None = "n"
    label: str = "l"
    out: FilePath = Path("out")
    model: FileName | None = None
    files: list[FileName] = Field([])
    names: tuple[str, ...] = ()
    some: tuple[str, ...] = Field(("a",), min_length=1)
    pair: tuple[float, float] = (0.0, 1.0)
    flag: bool = False
    anything: dict[str, Any] = Field({})
    words: dict[str, str] = Field({})
    grader: Grader = Grader()
    judge: Judge | None = None


def read(*overrides: str) -> Run:
    return load_config(Run, overrides=overrides)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("note", "Put it after #### at the end"),
        ("note", "=&x"),
        ("note", " a\n b: [c "),
        ("note", "'quoted'"),
        ("note", ""),
        ("note", "~"),
        ("label", "null"),
        ("label", "1e-6"),
        ("out", "runs/a #3"),
        ("model", "a: b"),
        ("words.key", "007"),
        ("grader.function.path", "a #1.py:f"),
    ],
)
def test_words_of_a_text_key_are_taken_as_they_are(key: str, text: str) -> None:
    value: Any = read(f"{key}={text}")
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert str(value) == text


def test_null_alone_is_null_where_a_text_key_may_be_null() -> None:
    config = read("note=null", "model=null", "anything.x=null")
    assert (config.note, config.model, config.anything) == (None, None, {"x": None})


def test_a_single_value_is_a_list_of_one() -> None:
    config = read("files=a.parquet", "names=c")
    assert (config.files, config.names) == (["a.parquet"], ("c",))
    with pytest.raises(ConfigError, match=r"pair: must be a valid tuple, not 1"):
        read("pair=1")


def test_paths_are_expanded_once_for_every_kind_of_path_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("WHERE", "data/~x")
    config = read("out=~/a", "model=${WHERE}/m", "files=[~/f, hub:org/name, b~]", "grader.path=~/r.py:f")
    assert config.out == Path("/home/ann/a")
    assert config.model == "data/~x/m"
    assert config.files == ["/home/ann/f", "hub:org/name", "b~"]
    assert config.grader.function.path == "/home/ann/r.py:f"


def test_a_short_form_of_a_later_source_wins_over_what_it_is_short_for(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("grader: {name: exact, function: {size: 3}}\n")
    config = load_config(Run, tmp_path / "run.yaml", ["grader.path=a.py:f"])
    assert (config.grader.name, config.grader.function) == ("function", Function(path="a.py:f", size=3))
    (tmp_path / "run.yaml").write_text("grader: {path: a.py:f}\n")
    assert load_config(Run, tmp_path / "run.yaml").grader.name == "function"
    assert load_config(Run, tmp_path / "run.yaml", ["grader.name=exact"]).grader.name == "exact"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("grader.path=", "grader.function.path: must be a path, not empty  (command line)"),
        ("grader={path: 3}", "grader.function.path: must be text, not 3; in quotes it would be text  (command line)"),
        ("grader={function: {sizes: 3}}", "grader.function.sizes: unknown key; did you mean grader.function.size?"),
        ("grader.function.size=x", "grader.function.size: must be a valid integer, not x  (command line)"),
        ("size=2", "grader.function.path: must be text, not 7; in quotes it would be text  ({file}:2)"),
    ],
)
def test_a_problem_is_placed_in_the_source_that_won(tmp_path: Path, override: str, problem: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"grader:\n  path: {7 if override == 'size=2' else 'a.py:f'}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(Run, file, [override])
    (line,) = str(raised.value).splitlines()[1:]
    assert line.strip().startswith(problem.format(file=file))
    assert line.endswith("(command line)") or override == "size=2"


def test_one_source_that_contradicts_its_short_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grader\.path means grader\.name=function, but grader\.name=exact is given"):
        read("grader.path=a.py:f", "grader.name=exact")
    with pytest.raises(ConfigError, match=r"grader: path is short for function\.path, but function is not a mapping"):
        read("grader={path: a.py, function: 3}")
    (tmp_path / "run.yaml").write_text("grader: {path: a.py:f, name: exact}\n")
    with pytest.raises(ConfigError, match=r"grader: path is short for function\.path with name=function, but name is"):
        load_config(Run, tmp_path / "run.yaml")


HUGE = "x" * 100_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": float("nan")}, "rate: must be a finite number, not .nan"),
        ({"rate": float("inf")}, "rate: must be a finite number, not .inf"),
        ({"some": []}, "some: must have at least 1 item, not []"),
        ({"cap": float("nan")}, "cap: must be greater than 0, not .nan"),
        ({"anything": {"a": [float("inf")]}}, "anything: must hold finite numbers only"),
        ({"size": 2**31}, "size: must be at most 2147483647"),
        ({"size": -(10**30)}, "size: must be at most 2147483647"),
        ({"share": 2**41}, "share: must be less than or equal to 1099511627776, not 2199023255552"),
        ({"anything": {"a": 2**63}}, "anything: must hold integers of 64 bits only"),
        ({"size": True}, "size: must be a number, not true"),
        ({"rate": "8e-1"}, "rate: must be a number without quotes, not "),
        ({"flag": "yes"}, "flag: must be true or false, not yes"),
        ({"flag": 1}, "flag: must be true or false, not 1"),
        ({"label": b"bytes"}, "label: must not be bytes"),
        ({"names": [b"bytes"]}, "names: must not be bytes"),
        ({"words": {"a": b"bytes"}}, "words: must not be bytes"),
        ({"anything": {"a": ["\ud800"]}}, "anything: must be Unicode text, without halves of surrogate pairs"),
        ({"anything": {"a": {1: 2}}}, "anything: has the key 1, which is not text; put it in quotes"),
        ({"out": "a\0b"}, "out: must be a path, not a NUL byte"),
        ({HUGE: 1}, "xx…: unknown key; known here: "),
        ({"flag": HUGE}, "flag: must be true or false, not xx"),
        ({"label": [HUGE]}, "label: must be text, not [xx"),
        ({f"k{i}": 1 for i in range(5000)}, "and 4900 more"),
    ],
)
def test_values_that_no_key_takes(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate_config(Run, values)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 30_000


def test_infinity_is_a_value_where_it_switches_a_limit_off() -> None:
    config = read("cap=.inf")
    assert config.cap == float("inf")
    assert validate_config(Run, parse(dump_config(config), "dump")[0]) == config


def test_an_override_that_is_very_long_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as raised:
        read(HUGE)
    assert len(str(raised.value)) < 300


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "f.yaml: holds 4611686018427387901 values with its aliases"),
        (MERGES, "f.yaml: holds .* values with its aliases"),
        ("a: &a [*a]", "f.yaml:1:4: not valid YAML: .* holds itself"),
        ("[" * 1000, "f.yaml:1:65: not valid YAML: more than 64 levels"),
        ("a: !!timestamp x", "f.yaml:1:4: not valid YAML: could not determine a constructor for the tag .*timestamp"),
        ("a: !!binary aGk=", "f.yaml:1:4: not valid YAML: could not determine a constructor for the tag .*binary"),
        ("a: !!set {b}", "f.yaml:1:4: not valid YAML: could not determine a constructor for the tag .*set"),
        ("a: !!bool x", "f.yaml: not valid YAML"),
        ("b: 1\n1: x", "f.yaml:2:1: not valid YAML: the key 1 is not text; put it in quotes"),
        ("? [a, b]\n: c", "not valid YAML: the key of several values is not text"),
        ("b: 1\na: \x07", r"f.yaml:2: not valid YAML: special characters are not allowed \(#x0007\)"),
        ("a: " + "9" * 5000, "f.yaml: not valid YAML: ValueError: Exceeds the limit"),
        (f"a: 1\n{'k' * 1000}: 1\n{'k' * 1000}: 2\n", "f.yaml:3:1: not valid YAML: key 'kkk"),
    ],
)
def test_yaml_that_is_not_read(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse(text, "f.yaml")
    assert len(str(raised.value)) < 400


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_text("#" * (1 << 20) + "\n")
    (tmp_path / "names.yaml").write_text("defaults: pipe.yaml\n")
    for name, message in [
        ("pipe.yaml", "cannot be read: is not a regular file"),
        ("/dev/zero", "cannot be read: is not a regular file"),
        (".", "cannot be read: is a folder"),
        ("names.yaml", r"cannot be read \(named by 'defaults' in .*names.yaml\): is not a regular file"),
        ("large.yaml", "cannot be read: is larger than 1 MiB"),
        ("a" * 5000, "cannot be read: .*File name too long"),
        ("a\0", "NUL byte"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(Run, tmp_path / name)


def test_files_below_files_are_expanded_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASES", str(tmp_path))
    (tmp_path / "f0.yaml").write_text("size: 7\n")
    for i in range(1, 40):  # each names the one before it twice
        (tmp_path / f"f{i}.yaml").write_text(f"defaults: ['${{BASES}}/f{i - 1}.yaml', f{i - 1}.yaml]\n")
    assert load_config(Run, "${BASES}/f3.yaml").size == 7
    with pytest.raises(ConfigError, match="a configuration may be made of 64 files through 'defaults' at most"):
        load_config(Run, tmp_path / "f39.yaml")


def test_packages_that_are_missing_are_named_with_their_keys() -> None:
    class Part(Config):
        def packages(self):
            yield "", Package("no_such_package", "some[thing]")
            yield "x", Package("no_such_parent.child", "other")
            yield "", Package("json", "never")

    class Whole(Config):
        part: Part = Part()
        parts: list[Part] = Field([])
        named: dict[str, Part] = Field({})

    advice = "needs the package no_such_package, which is not installed; run: pip install 'some[thing]'"
    found = missing_packages(Whole(parts=[{}], named={"a": {}}))
    assert [key for key, _ in found] == ["part", "part.x", "parts.0", "parts.0.x", "named.a", "named.a.x"]
    assert found[0] == ("part", advice)


def test_a_folder_of_the_name_of_a_package_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not Package("no_such_package", "some[thing]").installed
    (tmp_path / "no_such_package" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert Package("no_such_package", "some[thing]").installed


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["judge=strict"], {"name": "strict"}),
        (["judge=a/b"], {"name": "model", "model": {"path": "a/b"}}),
        (["judge.model.size=3", "judge=a/b"], {"name": "model", "model": {"path": "a/b", "size": 3}}),
        (["judge.model=a: b/c #1", "judge.model.size=3"], {"name": "model", "model": {"path": "a: b/c #1", "size": 3}}),
        (["judge.name=strict", "judge.model.size=3"], {"name": "strict", "model": {"size": 3}}),
        (["judge=strict", "judge=null"], None),
    ],
)
def test_a_text_in_the_place_of_a_section(overrides: list[str], expected: Any) -> None:
    assert read(*overrides).judge == (None if expected is None else Judge.model_validate(expected))
    assert load_config(Run, overrides=overrides) == Run.model_validate({"judge": expected})
