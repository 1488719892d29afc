"""The text of a shell script."""

from __future__ import annotations

from pathlib import Path

from rlcore.config.files import read_text
from rlcore.suggestions import similar_paths
from rlcore_recipes.from_verl.shell.state import Source


def script_source(path: Path) -> Source:
    """Read the script ``path``.

    Raises:
        ConfigError: it is missing, no regular file, too large, or not UTF-8.
    """
    text = read_text(path, "script", hint=similar_paths)
    return Source(str(path), text.encode().replace(b"\r\n", b"\n"))
