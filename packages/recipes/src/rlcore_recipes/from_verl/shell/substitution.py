"""What commands in ``$(…)`` print, for the few whose output is known without running them."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable
from datetime import datetime
from importlib.util import find_spec
from itertools import takewhile
from pathlib import PurePosixPath

from rlcore_recipes.from_verl.shell.state import State
from rlcore_recipes.from_verl.word import Unknown

_IMPORT = re.compile(r"\s*import\s+([A-Za-z_]\w*)\s*;?\s*")


def output(words: list[str], state: State) -> tuple[str, bool]:
    """Return what the command ``words`` prints, and whether it succeeds.

    Raises:
        Unknown: only running it would tell.
    """
    name, *arguments = words
    name = PurePosixPath(name).name
    if name == "readlink" and "-f" not in arguments:  # without it, the target of a link
        raise Unknown(f"$({' '.join(words)[:60]}) is not run")
    if name in _COMMANDS and not set(_options(arguments)) - set(_OPTIONS.get(name, ())):
        try:
            return _COMMANDS[name]([word for word in arguments if word not in _options(arguments)], state), True
        except (IndexError, ValueError):  # arguments are missing
            raise Unknown(f"$({' '.join(words)[:60]}) is not run") from None
    if name in ("true", ":"):
        return "", True
    if name == "false":
        return "", False
    imports = _IMPORT.fullmatch(arguments[1]) if len(arguments) == 2 and arguments[0] == "-c" else None
    if re.fullmatch(r"python[\d.]*", name) and imports:
        return "", find_spec(imports[1]) is not None
    if name in ("command", "which", "type") and arguments:
        found = shutil.which(arguments[-1], path=_text(state, "PATH"))
        return found or "", found is not None
    raise Unknown(f"$({' '.join(words)[:60]}) is not run")


def _options(arguments: list[str]) -> list[str]:
    """Return the options before the other words."""
    return list(takewhile(lambda word: re.fullmatch(r"-[A-Za-z-]+", word), arguments))


def _echo(arguments: list[str], state: State) -> str:
    return " ".join(arguments)


def _printf(arguments: list[str], state: State) -> str:
    form, *values = arguments or [""]
    if form.count("%") != form.count("%s") or form.count("%s") != len(values) or "{" in form:
        raise Unknown("$(printf …) is not run")
    return form.replace("\\n", "\n").replace("%s", "{}").format(*values)


def _basename(arguments: list[str], state: State) -> str:
    path, *suffix = arguments
    name = os.path.basename(path.rstrip("/")) or "/"
    return name.removesuffix(suffix[0]) if suffix and name != suffix[0] else name


def _dirname(arguments: list[str], state: State) -> str:
    return os.path.dirname(arguments[-1].rstrip("/")) or ("/" if arguments[-1].startswith("/") else ".")


def _realpath(arguments: list[str], state: State) -> str:
    if len(arguments) != 1:
        raise ValueError(arguments)
    return os.path.realpath(os.path.join(_folder(state), arguments[-1]))


def _date(arguments: list[str], state: State) -> str:
    formats = [argument for argument in arguments if argument.startswith("+")]
    if not formats or len(arguments) > 1:
        raise Unknown(f"$(date {' '.join(arguments)}) is not run")
    return datetime.now().astimezone().strftime(formats[0][1:].replace("%N", "%f"))


def _pwd(arguments: list[str], state: State) -> str:
    return _folder(state)


def _folder(state: State) -> str:
    if state.folder is None:
        raise Unknown("the working directory is not known here")
    return state.folder


def _text(state: State, name: str) -> str | None:
    value = state.variables.get(name)
    return value if isinstance(value, str) else None


_OPTIONS = {
    "echo": ("-n",),
    "basename": ("--",),
    "dirname": ("--",),
    "realpath": ("--", "-m", "-e"),
    "readlink": ("-f",),
    "pwd": ("-L", "-P"),
}
_COMMANDS: dict[str, Callable[[list[str], State], str]] = {
    "echo": _echo,
    "printf": _printf,
    "basename": _basename,
    "dirname": _dirname,
    "realpath": _realpath,
    "readlink": _realpath,  # with -f
    "date": _date,
    "pwd": _pwd,
    "hostname": lambda arguments, state: socket.gethostname(),
    "whoami": lambda arguments, state: _text(state, "USER") or "",
}
