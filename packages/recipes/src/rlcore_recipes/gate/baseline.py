"""The baseline of a comparison: a file of results, an interpreter, or a revision of a git repository."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rlcore.errors import ConfigError, RlcoreError
from rlcore_recipes.gate.compare import Arm
from rlcore_recipes.gate.results import Results


def open_baseline(name: str, root: Path) -> Arm:
    """Return the arm that ``name`` means.

    Args:
        name: a file of results ``*.jsonl``; a Python interpreter; otherwise a revision of the git repository in the
            working folder, whose environment is made by ``uv sync``.

    Raises:
        ConfigError: it is none of these.
        RlcoreError: the environment of a revision cannot be made.
    """
    path = Path(name)
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ConfigError(f"--baseline {name}: there is no such file")
        return Arm(name, Results(path))
    if path.is_file() and os.access(path, os.X_OK):
        return Arm("baseline", Results(root / "baseline.jsonl"), path.absolute())
    revision = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", problem=_UNKNOWN.format(name=name))[:12]
    return Arm(revision, Results(root / f"{revision}.jsonl"), _environment(revision, root / "revisions" / revision))


_UNKNOWN = (
    "--baseline {name} is neither a file of results (*.jsonl), nor a Python interpreter, nor a revision of a git "
    "repository in the working folder"
)


def _environment(revision: str, folder: Path) -> Path:
    """Check ``revision`` out into ``folder`` and return the interpreter of its environment."""
    python = folder / ".venv/bin/python"
    if python.exists():
        return python
    if shutil.which("uv") is None:
        raise ConfigError(f"--baseline {revision} is a revision, whose environment uv makes: run pip install uv")
    if not folder.exists():
        _git("worktree", "add", "--quiet", "--detach", str(folder), revision)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    _run(["uv", "sync", "--quiet", "--frozen", "--all-packages"], folder, environment)
    return python


def _git(*arguments: str, problem: str = "") -> str:
    return _run(["git", *arguments], Path.cwd(), dict(os.environ), problem)


def _run(command: Sequence[str], folder: Path, environment: dict[str, str], problem: str = "") -> str:
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(problem or f"{command[0]} cannot be started: {error.strerror or error}") from None
    if done.returncode != 0:
        if problem:
            raise ConfigError(problem)
        raise RlcoreError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip()
