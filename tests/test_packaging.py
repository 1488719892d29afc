"""What the packages require: versions of one another that fit, and extras that exist, suffice and are documented."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECTS: dict[str, dict[str, Any]] = {
    project["name"]: project
    for project in (
        tomllib.loads(path.read_text())["project"] for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
    )
}
FOLDERS = {
    tomllib.loads(path.read_text())["project"]["name"]: path.parent.name
    for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
EXTRAS = {name: project.get("optional-dependencies", {}) for name, project in PROJECTS.items()}
SOURCES = list(ROOT.glob("packages/*/src/**/*.py"))


def requirements(name: str, extras: set[str] | None = None) -> Iterator[Requirement]:
    """What a package of ours requires, with some of its extras (with all: None)."""
    chosen = EXTRAS[name] if extras is None else extras
    for text in [*PROJECTS[name].get("dependencies", []), *(text for extra in chosen for text in EXTRAS[name][extra])]:
        yield Requirement(text)


def installed_with(name: str, extras: set[str]) -> set[str]:
    """The distributions of ours, and the others that are required directly, that an installation brings."""
    found, open_ = {name}, [(name, frozenset(extras))]
    seen = set(open_)
    while open_:
        package, wanted = open_.pop()
        for requirement in requirements(package, set(wanted)):
            found.add(requirement.name)
            further = (requirement.name, frozenset(requirement.extras))
            if requirement.name in PROJECTS and further not in seen:
                seen.add(further)
                open_.append(further)
    return found


@pytest.mark.parametrize("name", PROJECTS)
def test_packages_require_versions_of_one_another_that_fit(name: str) -> None:
    """A version below the next minor one, which may change interfaces, and the one that is here."""
    for requirement in requirements(name):
        if requirement.name not in PROJECTS or requirement.name == name:
            continue
        version = Version(PROJECTS[requirement.name]["version"])
        assert version in requirement.specifier, f"{requirement} does not allow {version}"
        assert Version("0") not in requirement.specifier, f"{requirement} has no lower bound"
        following = (
            Version(f"{version.major}.{version.minor + 1}") if version.major == 0 else Version(f"{version.major + 1}")
        )
        assert following not in requirement.specifier, f"{requirement} allows {following}, which does not exist yet"


@pytest.mark.parametrize(
    ("extra", "needed"),
    [
        ("fsdp", set()),
        ("megatron", {"rlcore-engines-megatron", "ray"}),
        ("vllm", {"rlcore-rollout-vllm", "vllm"}),
        ("sglang", {"rlcore-rollout-sglang", "sglang"}),
        ("http", {"rlcore-rollout-http"}),
        ("agents", {"rlcore-agents"}),
    ],
)
def test_each_backends_extra_alone_runs_recipes(extra: str, needed: set[str]) -> None:
    """With the training engine and the rollout that configurations name by default."""
    defaults = {"rlcore-engines-fsdp", "rlcore-recipes", "rlcore-rewards"}
    assert installed_with("rlcore", {extra}) >= defaults | needed


def test_every_extra_of_a_package_is_one_of_the_cores() -> None:
    reached = {(r.name, extra) for r in requirements("rlcore") for extra in r.extras}
    own = {(name, extra) for name, extras in EXTRAS.items() if name != "rlcore" for extra in extras}
    assert own - reached == set()


def test_messages_name_extras_that_exist() -> None:
    named = {
        (name, extra)
        for path in SOURCES
        for name, extras in re.findall(r"(rlcore[\w-]*)\[([\w,]+)\]", path.read_text())
        if name in EXTRAS
        for extra in extras.split(",")
    }
    assert ("rlcore", "fsdp") in named
    assert {(name, extra) for name, extra in named if extra not in EXTRAS[name]} == set()


def test_every_extra_is_documented() -> None:
    table = (ROOT / "packages/core/README.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(extra for row in rows for extra in re.findall(r"`([\w-]+)`", row)) == sorted(EXTRAS["rlcore"])


def test_contributing_installs_what_every_packages_tests_need() -> None:
    """The packages' own groups "test" too, which hold more than the workspace's group of that name."""
    command = next(line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if "uv sync" in line)
    assert "--all-packages" in command
    chosen = set(re.findall(r"--group ([\w-]+)", command))
    projects = [
        tomllib.loads(path.read_text()) for path in [ROOT / "pyproject.toml", *ROOT.glob("packages/*/pyproject.toml")]
    ]
    groups = [project["dependency-groups"] for project in projects]
    assert chosen <= {name for group in groups for name in group}
    assert {name for group in groups[1:] for name in group} - {"sglang"} <= chosen


# --- continuous integration ------------------------------------------------------------------------------------------


def folders_of_tests(folder: str) -> set[str]:
    """Folders of the packages that the tests of a package need: it, its group "test", and what those require."""
    project = tomllib.loads((ROOT / "packages" / folder / "pyproject.toml").read_text())
    needed = [Requirement(text) for text in (project["project"]["name"], *project["dependency-groups"]["test"])]
    names = {
        name
        for requirement in needed
        if requirement.name in PROJECTS
        for name in installed_with(requirement.name, set(requirement.extras))
    }
    return {FOLDERS[name] for name in names if name in PROJECTS}


@pytest.mark.parametrize("folder", FOLDERS.values())
def test_every_package_has_a_workflow_that_runs_where_its_tests_may_change(folder: str) -> None:
    file = ROOT / ".github/workflows" / f"{folder}.yml"
    workflow = yaml.safe_load(file.read_text())
    assert workflow["jobs"][folder]["with"] == {"session": f"tests-{folder}"}
    events = workflow[True]  # YAML 1.1 reads the key "on" so
    assert events["pull_request"]["paths"] == events["push"]["paths"]
    files = {"uv.lock", "noxfile.py", ".github/workflows/package.yml", f".github/workflows/{file.name}"}
    assert set(events["push"]["paths"]) == files | {f"packages/{name}/**" for name in folders_of_tests(folder)}
