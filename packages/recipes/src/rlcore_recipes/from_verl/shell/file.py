"""The text of a shell script."""

from __future__ import annotations

from pathlib import Path

from rlcore.errors import ConfigError
from rlcore.regular_file import read_regular
from rlcore.suggestions import similar_paths
from rlcore_recipes.from_verl.shell.state import Source

LARGEST_SCRIPT = 1 << 20
"""The most bytes of a script."""


def script_source(path: Path) -> Source:
    """Read the script ``path``.

    Raises:
        ConfigError: it is missing, no regular file, too large, or not UTF-8.
    """
    try:
        text = read_regular(path, LARGEST_SCRIPT).replace(b"\r\n", b"\n")
        text.decode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such script{similar_paths(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    return Source(str(path), text)
