"""The rules of the sources: imports against the arrows, cycles, sizes of functions, words, docstrings.

``source_checks.py`` finds the offences without importing anything; here there must be none, and the checks themselves
are tested.
"""

from __future__ import annotations

import ast
import tomllib

import pytest

import source_checks
from source_checks import CORE, MAY_IMPORT, MODULES, PACKAGES, SHAPELESS


@pytest.mark.parametrize("check", source_checks.CHECKS)
def test_rules_are_kept(check: str) -> None:
    assert not source_checks.offences(check), "\n".join(map(str, source_checks.offences(check)))


def test_every_package_has_its_arrows() -> None:
    assert set(MODULES) <= set(MAY_IMPORT)


def test_imports_are_found_however_they_are_written() -> None:
    source = """
import rlcore_a.x, numpy as np
from rlcore_b.y import z
from . import near
from ..far import z
def late():
    if TYPE_CHECKING:
        import rlcore_c
    importlib.import_module("rlcore_d.x"); import_module("rlcore_e"); __import__("rlcore_f")
    import_module(name)
"""
    names = [name for _, name in source_checks.imports(ast.parse(source), "package.inner")]
    assert sorted(names) == [
        "numpy",
        "package.far.z",
        "package.inner.near",
        "rlcore_a.x",
        "rlcore_b.y.z",
        "rlcore_c",
        "rlcore_d.x",
        "rlcore_e",
        "rlcore_f",
    ]


def test_cycles_are_found() -> None:
    graph = {"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": ["e"], "e": [], "f": ["a", "g"], "g": ["f"]}
    assert source_checks.components(graph) == [["a", "b", "c"], ["f", "g"]]


def test_lines_of_a_function_are_counted_without_decorators_and_docstring() -> None:
    source = '''
@decorated(
    by=this
)
def function(
    argument,
):
    """Does

    something."""
    # a comment

    def inner():
        """Counts."""
        return argument
    return inner
'''
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert source_checks.lines_of(function) == 3 + 6


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("all at once, or not", 1),
        ('"starts at "\n    f"once"', 1),
        ("    # starts at\n    # once", 1),
        ("def test_all_start_at_once(): ...", 1),
        ("Nobody, WHOEVER is told of it", 3),
        ("besides, recommend, a renewed anewly, on demand, patient_id2", 1),
        ('description="Most tokens of a batch"', 1),
        ("Most tokens are short", 0),
    ],
)
def test_banned_words_are_found_over_lines_and_in_names(text: str, found: int) -> None:
    assert len(source_checks.BANNED_WORDS.findall(text)) == found


@pytest.mark.parametrize("module", MODULES)
def test_declared_dependencies_point_the_same_way(module: str) -> None:
    """What a package always pulls in; extras and dependency groups may name any other."""
    distributions = {
        tomllib.loads((PACKAGES / folder / "pyproject.toml").read_text())["project"]["name"]: name
        for name, folder in MODULES.items()
    }
    project = tomllib.loads((PACKAGES / MODULES[module] / "pyproject.toml").read_text())["project"]
    required = {name for name in project.get("dependencies", []) if name.startswith("rlcore")}
    names = {name.split("[")[0].split("=")[0].split(">")[0].split("<")[0].split("~")[0].strip() for name in required}
    assert {distributions[name] for name in names} <= MAY_IMPORT[module]
    assert (CORE in {distributions[name] for name in names}) == (module != CORE)


def test_modules_are_named_after_their_subject() -> None:
    named = [
        str(path.relative_to(PACKAGES))
        for module, package in MODULES.items()
        for path in (PACKAGES / package / "src" / module).rglob("*")
        if path.stem in SHAPELESS and (path.suffix == ".py" or path.is_dir())
    ]
    assert named == []


def test_configuration_models_are_in_modules_called_settings() -> None:
    named = [str(path) for path in source_checks.sources() if path.name == "config.py"]
    assert named == ["packages/core/src/rlcore/cli/config.py"]  # the command `rlcore config`


@pytest.mark.parametrize("module", MODULES)
def test_packages_are_complete(module: str) -> None:
    package = PACKAGES / MODULES[module]
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", f"src/{module}/py.typed", "tests"):
        assert (package / name).exists(), f"{package.name} lacks {name}"
    assert (package / "README.md").read_text().strip()
    version = tomllib.loads((package / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (package / "CHANGELOG.md").read_text()
    assert "Apache License" in (package / "LICENSE").read_text()
