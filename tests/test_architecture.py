"""Arrows point one way: backends → core ← recipes. Found by reading the sources, without importing anything."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
CORE = "rlcore"
RECIPES = "rlcore_recipes"
SHAPELESS = {"utils", "util", "helpers", "helper", "common", "misc"}

# import name -> folder below packages/
MODULES = {source.name: source.parents[1].name for source in PACKAGES.glob("*/src/*") if (source / "py.typed").exists()}
BACKENDS = sorted(set(MODULES) - {CORE, RECIPES})


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every absolute import: statements, and calls that import a constant name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__", "importorskip") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value).split(".")[0]


def crossings(module: str, folder: str, forbidden: set[str]) -> list[str]:
    """Where files below ``folder`` of a package import ``forbidden`` modules."""
    root = PACKAGES / MODULES[module]
    return [
        f"{file.relative_to(PACKAGES)}:{line} imports {name}"
        for file in sorted((root / folder).rglob("*.py"))
        for line, name in imports(ast.parse(file.read_text(), str(file)))
        if name in forbidden
    ]


def test_all_seven_packages_are_looked_at() -> None:
    assert MODULES == {
        "rlcore": "core",
        "rlcore_fsdp": "engines-fsdp",
        "rlcore_megatron": "engines-megatron",
        "rlcore_vllm": "rollout-vllm",
        "rlcore_sglang": "rollout-sglang",
        "rlcore_rewards": "rewards",
        "rlcore_recipes": "recipes",
    }


def test_imports_are_found_however_they_are_written() -> None:
    source = """
import rlcore_a.x, numpy as np
from rlcore_b.y import z
from . import rlcore_no
from .rlcore_no import z
def late():
    if TYPE_CHECKING:
        import rlcore_c
    importlib.import_module("rlcore_d.x"); import_module("rlcore_e"); __import__("rlcore_f")
    import_module(name)
"""
    names = [name for _, name in imports(ast.parse(source))]
    assert sorted(names) == ["numpy", *(f"rlcore_{letter}" for letter in "abcdef")]


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_core_imports_no_other_package(folder: str) -> None:
    assert crossings(CORE, folder, set(MODULES) - {CORE}) == []


@pytest.mark.parametrize("folder", ["src", "tests"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_import_only_core(backend: str, folder: str) -> None:
    assert crossings(backend, folder, set(MODULES) - {CORE, backend}) == []


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_recipes_name_backends_but_do_not_import_them(folder: str) -> None:
    assert crossings(RECIPES, folder, set(BACKENDS)) == []


@pytest.mark.parametrize("module", MODULES)
def test_declared_dependencies_point_the_same_way(module: str) -> None:
    """What a package always pulls in; extras and dependency groups may name any other."""
    project = tomllib.loads((PACKAGES / MODULES[module] / "pyproject.toml").read_text())["project"]
    required = {name for name in project.get("dependencies", []) if name.startswith("rlcore")}
    names = {name.split("[")[0].split("=")[0].split(">")[0].split("<")[0].split("~")[0].strip() for name in required}
    assert names == (set() if module == CORE else {"rlcore"})


def test_modules_are_named_after_their_subject() -> None:
    named = [
        str(path.relative_to(PACKAGES))
        for module, package in MODULES.items()
        for path in (PACKAGES / package / "src" / module).rglob("*")
        if path.stem in SHAPELESS and (path.suffix == ".py" or path.is_dir())
    ]
    assert named == []


@pytest.mark.parametrize("module", MODULES)
def test_packages_are_complete(module: str) -> None:
    package = PACKAGES / MODULES[module]
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", f"src/{module}/py.typed", "tests"):
        assert (package / name).exists(), f"{package.name} lacks {name}"
    assert (package / "README.md").read_text().strip()
    version = tomllib.loads((package / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (package / "CHANGELOG.md").read_text()
    assert "Apache License" in (package / "LICENSE").read_text()
