"""Functions in Python files that the user names as ``path/to/file.py:function``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from rlcore.errors import DataError
from rlcore.suggestions import definitions_of, similar_paths


def function_in(path: Path, name: str) -> Callable[..., Any]:
    """Import the file at ``path`` and return its function ``name``.

    Raises:
        DataError: there is no such file or function, or the file cannot be imported.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist{similar_paths(path)}")
    spec = spec_from_file_location(f"rlcore_data_set_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # where annotations are looked up
    sys.path.insert(0, str(path.parent.resolve()))  # the file can import its neighbours, as a script can
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(f"{path} cannot be imported: {error!r}") from error
    finally:
        sys.path.pop(0)
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(f"{path} has no function {name!r}{_nested(path, name) or definitions_of(module)}")
    return function  # type: ignore[no-any-return]


def _nested(path: Path, name: str) -> str:
    """Return where else in the file the function is defined; verl's scripts do so under ``if __name__ == …``."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (
                f" at its top level; line {node.lineno} defines it inside another block, which is not run when the "
                "file is imported: move it out of that block, with what it uses"
            )
    return ""
