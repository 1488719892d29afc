"""Every check of the project, each in an environment of its own.

``nox`` runs all sessions that CI runs. A package's session holds only that package and what it declares.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "typecheck", "tests", "docs", "integration", "integration-sglang"]

PACKAGES = sorted(path.parent.name for path in Path("packages").glob("*/pyproject.toml"))
# What a package's tests need beside its group "test", and what does not fit into one environment with the others'.
OTHER_GROUPS = {"rollout-sglang": ("--group", "sglang")}
SGLANG_RECIPES = "tests/recipes/sglang"
# One takes both cores; the other kills processes at random moments and looks for what stays in shared memory.
ALONE = ("tests/test_quickstart.py", "tests/recipes/test_recipes_faults.py")
# Two files of tests at a time. Not where all files share one inference server, which takes minutes to start.
SIDE_BY_SIDE = ("--numprocesses", "2", "--dist", "loadfile")
ONE_BY_ONE = {"rollout-sglang", "rollout-vllm"}
# One thread per process: tests start several processes, and threads that compete are slower than one.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "120",  # as where there is no terminal; pytest-xdist tells its processes of a narrower one
    "PYTHONDONTWRITEBYTECODE": "",  # unset: tests start hundreds of processes, which would each compile all they import
}


def sync(session: nox.Session, *arguments: str) -> None:
    """Install exactly what the lock file says for ``arguments``."""
    session.run_install(
        "uv",
        "sync",
        "--frozen",
        *arguments,
        env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location},
        silent=True,
    )


def pytest(session: nox.Session, *arguments: str) -> None:
    session.run("pytest", *arguments, *session.posargs, env=ENVIRONMENT)


def package_tests(session: nox.Session, package: str) -> None:
    name = {"core": "rlcore"}.get(package, f"rlcore-{package}")
    sync(session, "--package", name, "--group", "test", *OTHER_GROUPS.get(package, ()))
    pytest(session, f"packages/{package}/tests", *(() if package in ONE_BY_ONE else SIDE_BY_SIDE))


for package in PACKAGES:
    nox.session(name=f"tests-{package}")(lambda session, package=package: package_tests(session, package))


@nox.session
def tests(session: nox.Session) -> None:
    """The tests of every package, each in its own environment."""
    for package in PACKAGES:
        session.notify(f"tests-{package}")


def tests_with(session: nox.Session, resolution: str) -> None:
    """The tests of all that ``rlcore[fsdp]`` installs, with versions of dependencies that are not the lock file's."""
    packages = [Path("packages", name).absolute() for name in ("core", "engines-fsdp", "rewards", "recipes")]
    editable = [argument for package in packages for argument in ("--editable", str(package))]
    group = f"{packages[-1] / 'pyproject.toml'}:test"  # the recipes' tests need every other package's too
    # from outside the workspace, whose constraints would choose torch and transformers
    with TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        session.install("--upgrade", "--resolution", resolution, *editable, "--group", group)
    for package in packages:
        pytest(session, str(package / "tests"), *SIDE_BY_SIDE)


@nox.session(name="tests-lowest", default=False)
def tests_lowest(session: nox.Session) -> None:
    """The lowest versions that the packages say they work with."""
    tests_with(session, "lowest-direct")


@nox.session(name="tests-newest", default=False)
def tests_newest(session: nox.Session) -> None:
    """The newest versions that there are."""
    tests_with(session, "highest")


@nox.session
def integration(session: nox.Session) -> None:
    """Cross-package, end-to-end, fault-injection and installation tests."""
    sync(session, "--all-packages", "--group", "test", "--group", "trackers", "--group", "ray")
    pytest(session, "tests", *(f"--ignore={path}" for path in (SGLANG_RECIPES, *ALONE)), *SIDE_BY_SIDE)
    if not session.posargs:  # which choose among the tests above
        pytest(session, *ALONE)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Every mutation of every input file and every odd value of every key: an hour. A part runs in "integration"."""
    sync(session, "--all-packages", "--group", "test", "--group", "trackers", "--group", "ray")
    session.run("pytest", "tests/fuzz", *session.posargs, env={**ENVIRONMENT, "FUZZ_CASES": "all"})


@nox.session(name="integration-sglang")
def integration_sglang(session: nox.Session) -> None:
    """Recipes that generate with SGLang, which pins other versions than vLLM does."""
    names = ("rollout-sglang", "engines-fsdp", "engines-megatron", "recipes", "rewards")
    packages = [argument for name in names for argument in ("--package", f"rlcore-{name}")]
    sync(session, *packages, "--group", "test", *OTHER_GROUPS["rollout-sglang"])
    pytest(session, SGLANG_RECIPES)


@nox.session
def lint(session: nox.Session) -> None:
    sync(session, "--only-group", "lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    sync(session, "--all-packages", "--group", "typecheck", "--group", "test", "--group", "ray")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    # the API pages import what they show, and the page of configuration keys shows every backend's
    sync(session, "--all-packages", "--group", "docs", "--group", "test")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session(default=False)
def quickstart(session: nox.Session) -> None:
    """The README's learning curve, made anew."""
    sync(session, "--all-packages")
    session.run(
        "rlcore", "quickstart", *session.posargs, env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    )
