"""Errors of configurations: all problems together, with keys and places."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from rlcore import plugins
from rlcore.config import (
    Algorithm,
    AlgorithmField,
    Config,
    FilePath,
    ForeignKey,
    PluginSections,
    load_config,
    validate_config,
)
from rlcore.config.registry import Registry
from rlcore.errors import ConfigError

fruits: Registry = Registry("test fruit")


class AppleParams(Config):
    weight: int = Field(1, gt=0)


@fruits.register("apple", params=AppleParams)
def apple(params): ...


@fruits.register("pear")
def pear(params): ...


class Optim(Config):
    lr: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "linear"] = "constant"
    steps: int | Literal["all"] = "all"


class Engine(PluginSections):
    plugin_group = "rlcore.train_engines"
    engine: str = "acme"
    optim: Optim = Optim()


class Model(Config):
    path: str


class Run(Config):
    model: Model
    actor: Engine = Field(default_factory=Engine)
    fruit: Annotated[Algorithm, AlgorithmField(fruits)] = "apple"
    pools: dict[str, Optim] = Field({})
    stages: list[Optim] = Field([])
    out: FilePath = Path("out")
    batch: int = 8
    mini: int = 4

    def problems(self):
        if self.batch % self.mini:
            yield "mini", f"batch={self.batch} is not a multiple of mini={self.mini}"
        if self.batch > 100:
            yield "actor.optim", "cannot take so much"


SETTINGS = """
from rlcore.config import Config
from rlcore.plugins import Plugin

class Inner(Config):
    size: int = 2

class Settings(Config):
    depth: int = 1
    inner: Inner = Inner()

acme = Plugin(interface=1, config="acme_plugin:Settings", factory="acme_plugin:Settings")
half = Plugin(interface=1, config="acme_none:Settings", factory="acme_plugin:Settings")
old = Plugin(interface=9, config="acme_plugin:Settings", factory="acme_plugin:Settings")
"""


@pytest.fixture(autouse=True)
def engines(distribution):
    names = {name: f"acme_plugin:{name}" for name in ("acme", "old", "half")} | {"gone": "acme_gone:x"}
    points = {"rlcore.train_engines": names}
    distribution("acme-engines", points, {"acme_plugin": SETTINGS})


def problems(*overrides: str, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(Run, path, overrides)
    return [line.strip() for line in str(raised.value).splitlines()[1:]]


GOOD = "model.path=m"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "model.path: is required"),
        (["model=m"], "model: must be a mapping of keys, not m"),
        ([GOOD, "actor.optim.lr=-1"], "actor.optim.lr: must be greater than 0, not -1"),
        ([GOOD, "actor.optim.lr=fast"], "actor.optim.lr: must be a valid number, not fast"),
        ([GOOD, "actor.optim.schedule=cosin"], "actor.optim.schedule: must be 'constant' or 'linear', not cosin"),
        ([GOOD, "actor.optim.steps=x"], "actor.optim.steps: must be a valid integer or must be 'all', not x"),
        ([GOOD, "batch=1.5"], "batch: must be a valid integer, not 1.5"),
        ([GOOD, "out="], "out: must be a path, not empty"),
        ([GOOD, "out=~no one/x"], "out: there is no home folder ~no one"),
        ([GOOD, "out=a/${NOT SET}"], "out: the environment variable NOT SET is not set"),
        ([GOOD, "modle.path=m"], "modle: unknown key; did you mean model?"),
        ([GOOD, "actor.optim.lrr=1"], "actor.optim.lrr: unknown key; did you mean actor.optim.lr?"),
        ([GOOD, "actor.acme.dept=1"], "actor.acme.dept: unknown key; did you mean actor.acme.depth?"),
        (
            [GOOD, "actor.acme.inner.sizes=1"],
            "actor.acme.inner.sizes: unknown key; did you mean actor.acme.inner.size?",
        ),
        ([GOOD, "actor.acme.inner.size=big"], "actor.acme.inner.size: must be a valid integer, not big"),
        ([GOOD, "actor.acne.depth=1"], "actor.acne: unknown key; did you mean actor.acme?"),
        ([GOOD, "actor.optim.zzz=1"], "actor.optim.zzz: unknown key; known here: lr, schedule, steps"),
        ([GOOD, "actor.engine=acne"], "actor.engine: unknown training engine 'acne'; did you mean 'acme'?"),
        ([GOOD, "actor.engine=acm"], "actor.engine: unknown training engine 'acm'; did you mean 'acme'?"),
        ([GOOD, "fruit=aple"], "fruit: unknown test fruit 'aple'; did you mean 'apple'?"),
        (
            [GOOD, "fruit=3"],
            "fruit: must be the name of one test fruit, or a mapping with 'name' and its parameters, not 3",
        ),
        ([GOOD, "fruit.weight=0"], "fruit.weight: must be greater than 0, not 0"),
        ([GOOD, "fruit.wieght=1"], "fruit.wieght: unknown key; did you mean fruit.weight?"),
        ([GOOD, "fruit=pear", "fruit.weight=1"], "fruit.weight: unknown key; known here: none"),
        ([GOOD, "pools.big.lrr=1"], "pools.big.lrr: unknown key; did you mean pools.big.lr?"),
        ([GOOD, "stages=[{lr: 1}, {lr: 0}]"], "stages.1.lr: must be greater than 0, not 0"),
        ([GOOD, "batch=9"], "mini: batch=9 is not a multiple of mini=4"),
    ],
)
def test_one_problem(overrides, line):
    assert problems(*overrides) == [line]


def test_plugin_of_another_interface_version():
    (line,) = problems(GOOD, "actor.engine=old")
    assert line.startswith("actor.engine: training engine 'old' (acme-engines 1.5) was written for interface 9")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "half",
            "configuration acme_none:Settings cannot be imported: ModuleNotFoundError: No module named 'acme_none'",
        ),
        ("gone", "training engine 'gone' (acme-engines 1.5) cannot be imported: ModuleNotFoundError: No module named"),
    ],
)
def test_plugin_that_is_named_and_broken(name, reason):
    (line,) = problems(GOOD, f"actor.engine={name}")
    assert line.startswith(f"actor.engine: {reason}")
    assert "did you mean" not in line


def test_section_of_one_of_ours_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(plugins.OURS, ("rlcore.train_engines", "absent"), "rlcore[absent]")
    (line,) = problems(GOOD, "actor.absent.x=1")
    assert line == "actor.absent: training engine 'absent' is not installed; run: pip install 'rlcore[absent]'"


def test_all_problems_are_reported_together():
    found = problems(
        "actor.engine=acne",
        "actor.optim.lr=0",
        "actor.acme.inner.sizes=1",
        "fruit.weight=0",
        "fruit.wieght=0",
        "pools.x.schedule=1",
        "modle=1",
        "batch=x",
    )
    keys = {line.partition(":")[0] for line in found}
    assert keys == {
        "model.path",
        "actor.engine",
        "actor.optim.lr",
        "actor.acme.inner.sizes",
        "fruit.weight",
        "fruit.wieght",
        "pools.x.schedule",
        "modle",
        "batch",
    }


def test_default_plugin_that_is_missing_hides_nothing(monkeypatch):
    monkeypatch.setattr("rlcore.plugins._points", lambda group: {})
    assert problems("batch=x") == [
        "model.path: is required",
        "actor.engine: unknown training engine 'acme'; installed: none",
        "batch: must be a valid integer, not x",
    ]


def test_combinations_are_reported_together():
    assert problems(GOOD, "batch=101") == [
        "mini: batch=101 is not a multiple of mini=4",
        "actor.optim: cannot take so much",
    ]


def test_values_of_any_kind_can_be_reported():
    with pytest.raises(ConfigError, match=r"batch: must be a valid integer, not <object object at .*>") as raised:
        validate_config(Run, {"model": {"path": "m"}, "batch": object(), "mini": {"a": Path("x")}})
    assert "mini: must be a valid integer, not {a: x}" in str(raised.value)


def test_several_combinations_of_one_key():
    class Strict(Config):
        size: int = 1

        def problems(self):
            yield "size", "is too small"
            yield "size", "is odd"

    with pytest.raises(ConfigError, match=r"\n  size: is too small; is odd$"):
        validate_config(Strict, {})


def test_validators_of_pydantic_keep_their_message():
    class Checked(Config):
        inner: Optim = Optim()

        @model_validator(mode="after")
        def _check(self):
            raise ValueError("no good: {inner}")

    with pytest.raises(ConfigError, match=r"\n  no good: \{inner\}$"):
        validate_config(Checked, {})


def test_places_in_files_and_on_the_command_line(tmp_path):
    base, run = tmp_path / "base.yaml", tmp_path / "run.yaml"
    base.write_text("batch: x\nactor:\n  optim:\n    lr: 0\n")
    run.write_text("defaults: base.yaml\n\nmodel: {}\nfruit:\n  name: apple\n  wieght: 1\n")
    with pytest.raises(ConfigError) as raised:
        load_config(Run, run, ["mini=y", "actor.acme.depth=z"])
    assert str(raised.value).splitlines() == [
        f"invalid configuration (6 problems; {base}; {run}; command line):",
        f"  model.path: is required  ({run}:3)",
        f"  actor.optim.lr: must be greater than 0, not 0  ({base}:4)",
        "  actor.acme.depth: must be a valid integer, not z  (command line)",
        f"  fruit.wieght: unknown key; did you mean fruit.weight?  ({run}:6)",
        f"  batch: must be a valid integer, not x  ({base}:1)",
        "  mini: must be a valid integer, not y  (command line)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"run\.yaml:1:6: not valid YAML: "),
        ("seed: 1\n\tx: 2", r"run\.yaml:2:1: not valid YAML: "),
        ("- a\n- b\n", r"run\.yaml:1: must be a mapping of keys, not \[a, b\]"),
        ("just text", r"run\.yaml:1: must be a mapping of keys, not just text"),
        ("batch: 1\nmini: 1\nbatch: 2\n", r"run\.yaml:3:1: not valid YAML: key 'batch' stands here twice"),
        ("a: 1\n---\nb: 2\n", r"run\.yaml:2:1: not valid YAML: "),
        ("x: !!python/name:os.system", r"run\.yaml:1:4: not valid YAML: "),
        ("defaults: {a: 1}", r"run\.yaml:1: defaults must be a file name or a list of them"),
        ("defaults: gone.yaml", r"gone\.yaml: no such configuration file \(named by 'defaults' in .*run\.yaml\)"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Run, tmp_path / "run.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such configuration file$"):
        load_config(Run, tmp_path / "gone.yaml")


def test_folder_and_binary_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Run, tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"x\.yaml: cannot be read"):
        load_config(Run, tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch", r"override 'batch': must look like a\.b\.c=value"),
        ("=3", "must look like"),
        ("a..b=3", "must look like"),
        ("--batch=3", "must look like"),
        ("files=[1", r"override files:1:3: not valid YAML: .*; put text with special .* in quotes: 'files=\"…\"'"),
        ("files=*.parquet", r"override files:1:2: not valid YAML: .*quotes"),
        ("fruit=apple #3", r"override fruit: YAML reads 'apple #3' as apple; put text .* in quotes: 'fruit=\"…\"'"),
        ("batch=#3", "override batch: YAML reads '#3' as null; put text"),
        ("x=a\n b", r"override x: YAML reads 'a\\n b' as a b; put text"),
    ],
)
def test_malformed_overrides(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Run, overrides=[override])


def test_models_stay_pydantic_models_for_python_callers():
    with pytest.raises(ValidationError, match="unknown key; did you mean path"):
        Model(pth="x")
    run = Run(model=Model(path="m"), actor=Engine(acme={"depth": 3}), fruit="pear")
    assert run.actor.options.depth == 3
    assert Run.model_validate(run) is run
    with pytest.raises(ValidationError, match="frozen"):
        run.batch = 3


class Renamed(Run):
    @classmethod
    def foreign_keys(cls, name):
        if name in ("a.b", "momentum"):
            yield ForeignKey("Acme", name, ("actor.optim.lr",), "twice as large")
        if name == "a.c":
            yield ForeignKey("Acme", name, (), "it is always on")
        if name == "critic_lr":
            yield ForeignKey("Acme", name, ("critic.lr",))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("momentum=1", "momentum: unknown key; Acme's momentum is actor.optim.lr (twice as large)"),
        (
            "a={b: 1, c: 2}",
            "a: unknown key; Acme's a.b is actor.optim.lr (twice as large); Acme's a.c has no key here: it",
        ),
        ("critic_lr=1", "critic_lr: unknown key; Acme's critic_lr is critic.lr, which this recipe does not have"),
        ("bacth=1", "bacth: unknown key; did you mean batch"),
    ],
)
def test_keys_of_other_frameworks_are_answered_with_ours(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(Renamed, None, ["model.path=m", override])
    assert line in str(raised.value)
