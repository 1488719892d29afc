"""Every check of the project, each in its own environment.

``nox`` runs all sessions of CI, `LANES` at a time. A package's session holds only that package and what it declares.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.options.default_venv_backend = "uv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["everything"]

PACKAGES = sorted(path.parent.name for path in Path("packages").glob("*/pyproject.toml"))
# Groups that a package's tests need besides "test". What is here does not fit into one environment with the others.
OTHER_GROUPS = {"rollout-sglang": ("--group", "sglang")}
SGLANG_RECIPES = "tests/recipes/sglang"
LANES = 2
"""Sessions that `everything` runs at a time."""
FIRST = (
    "integration",
    "tests-agents",
    "tests-rollout-vllm",
    "tests-rollout-sglang",
    "tests-controller-ray",
    "integration-sglang",
)
"""The longest sessions in falling order; `everything` starts with them, so that the lanes end together."""
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
    pytest(session, f"packages/{package}/tests")


for package in PACKAGES:
    nox.session(name=f"tests-{package}")(lambda session, package=package: package_tests(session, package))


@nox.session(default=False)
def tests(session: nox.Session) -> None:
    """The tests of every package, each in its own environment."""
    for package in PACKAGES:
        session.notify(f"tests-{package}")


@nox.session(venv_backend="none")
def everything(session: nox.Session) -> None:
    """Run all checks of CI, `LANES` at a time. Print the output of each when it has ended; .nox/logs keeps it."""
    names = ["lint", "typecheck", "docs", "integration", "integration-sglang", *(f"tests-{name}" for name in PACKAGES)]
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    logs = Path(".nox/logs").absolute()
    logs.mkdir(parents=True, exist_ok=True)
    files = logs / "seconds-of-files.jsonl"
    files.unlink(missing_ok=True)
    environment = {**os.environ, "FILE_SECONDS": str(files)}

    def run(name: str) -> tuple[int, float, float]:
        """Return the exit code, the minutes and the minutes of CPU time."""
        print(f"{name}: started", flush=True)
        start = time.monotonic()
        with (logs / f"{name}.log").open("w") as log:
            command = [sys.executable, "-m", "nox", "--session", name, "--", *session.posargs]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, (time.monotonic() - start) / 60, (usage.ru_utime + usage.ru_stime) / 60

    ended: dict[str, tuple[int, float, float]] = {}
    with ThreadPoolExecutor(LANES) as lanes:
        started = {lanes.submit(run, name): name for name in names}
        for future in as_completed(started):
            name = started[future]
            ended[name] = future.result()
            print(f"\n{f' {name} ':=^120}\n{(logs / f'{name}.log').read_text(errors='replace')}", flush=True)

    seconds: Counter[str] = Counter()
    for line in files.read_text().splitlines() if files.exists() else ():
        seconds.update(json.loads(line))
    print("\nslowest files")
    for file, spent in seconds.most_common(10):
        print(f"{spent:7.1f} s  {file}")
    print("\nminutes  of CPU time")
    for name, (code, minutes, cpu) in sorted(ended.items(), key=lambda item: -item[1][1]):
        print(f"{minutes:7.1f} {cpu:7.1f}  {name}{'' if code == 0 else '  FAILED'}")
    if failed := [name for name, (code, *_) in ended.items() if code != 0]:
        session.error(f"failed: {', '.join(sorted(failed))}")


def tests_with(session: nox.Session, resolution: str) -> None:
    """Test what ``rlcore[fsdp,ray]`` installs, with versions of dependencies that are not those of the lock file."""
    names = ("core", "backend-kit", "controller-ray", "rollout-inline", "engines-fsdp", "rewards", "recipes")
    packages = [Path("packages", name).absolute() for name in names]
    editable = [argument for package in packages for argument in ("--editable", str(package))]
    group = f"{packages[-1] / 'pyproject.toml'}:test"  # the recipes' tests need every other package's too
    # from outside the workspace, whose constraints would choose torch and transformers
    with TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        session.install("--upgrade", "--resolution", resolution, *editable, "--group", group)
    for package in packages:
        pytest(session, str(package / "tests"))


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
    """Cross-package, end-to-end, fault-injection and installation tests, two files at a time."""
    sync(session, "--all-packages", "--group", "test", "--group", "trackers", "--group", "ray")
    environment = {"SKYPILOT_PYTHON": skypilot(session)}
    arguments = ("tests", f"--ignore={SGLANG_RECIPES}", "--numprocesses", "2", "--dist", "loadfile")
    session.run("pytest", *arguments, *session.posargs, env={**ENVIRONMENT, **environment})


def skypilot(session: nox.Session) -> str:
    """Install SkyPilot, which pins what the lock file has otherwise, in its own environment; return its Python."""
    folder = Path(session.virtualenv.location, "skypilot")
    session.run_install("uv", "venv", "--quiet", "--allow-existing", str(folder))
    python = str(folder / "bin/python")
    pinned = ("skypilot==0.14.1", "--exclude-newer", "2026-11-29")
    session.run_install("uv", "pip", "install", "--quiet", "--python", python, *pinned)
    return python


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
def gate(session: nox.Session) -> None:
    """Train every task of the learning gate; ``nox -s gate -- compare --baseline REVISION`` compares them."""
    sync(session, "--all-packages", "--group", "test")
    session.run("rlcore-gate", *(session.posargs or ["run"]), "--root", session.create_tmp(), env=ENVIRONMENT)


@nox.session(default=False)
def quickstart(session: nox.Session) -> None:
    """Train the README's learning curve in full. The session "integration" trains its beginning."""
    sync(session, "--all-packages", "--group", "test")
    full = {"QUICKSTART_STEPS": "140", "OMP_NUM_THREADS": "2"}
    session.run("pytest", "tests/test_quickstart.py", *session.posargs, env={**ENVIRONMENT, **full})
