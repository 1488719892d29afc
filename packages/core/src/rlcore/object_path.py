"""Functions and classes of a user, named ``file.py:name`` or ``package.module:name``."""

from __future__ import annotations

import re
import sys
from functools import reduce
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from rlcore.errors import ConfigError
from rlcore.suggestions import definitions_of, similar_paths

_PATH = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")


def checked_object_path(path: str) -> str:
    """Return ``path``.

    Raises:
        ValueError: it names no object.
    """
    if not _PATH.fullmatch(path):
        raise ValueError(f"{path!r} is neither 'file.py:name' nor 'package.module:name'")
    return path


def existing_file(name: str) -> Path:
    """Return the absolute path of a file of Python code.

    Raises:
        ConfigError: it is no regular file of this machine.
    """
    from rlcore.config.values import is_url  # pydantic, which worker processes that load objects do without

    if is_url(name):
        raise ConfigError("it must be in a file on this machine, not at a URL")
    file = Path(name).expanduser().resolve()
    if not file.is_file():
        problem = "is not a regular file" if file.exists() else f"does not exist{similar_paths(file)}"
        raise ConfigError(f"file {file} {problem}")
    return file


def load_object(home: str, name: str) -> Any:
    """Import the file or module ``home``, and return its object ``name``, which may be dotted.

    Raises:
        ConfigError: there is no such module or object. Errors of the module's own code pass.
    """
    module = _from_file(Path(home).expanduser().resolve()) if home.endswith(".py") else _from_import(home)
    try:
        return reduce(getattr, name.split("."), module)
    except AttributeError:
        raise ConfigError(f"{home} has no {name!r}{definitions_of(module)}") from None


def _from_file(file: Path) -> ModuleType:
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # the file can import its neighbours, as a script can
    spec = spec_from_file_location(f"rlcore_user_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and others look up their module here
    spec.loader.exec_module(module)
    return module


def _from_import(home: str) -> ModuleType:
    try:
        return import_module(home)
    except ModuleNotFoundError as error:
        if error.name and (home == error.name or home.startswith(f"{error.name}.")):
            raise ConfigError(f"there is no module {error.name!r}") from None
        raise
