"""Configuration files, and the files that they name below themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from rlcore.config import yaml_format
from rlcore.config.values import expanded
from rlcore.errors import ConfigError
from rlcore.regular_file import read_regular

DEFAULTS_KEY = "defaults"
LARGEST_FILE = 1 << 20
"""The most bytes of a configuration file, or another text that configures a run."""
MOST_FILES = 64
"""Files that one configuration may be made of, each counted as often as it is named."""


@dataclass(frozen=True)
class Layer:
    """Values from one source ("" for one that the user did not give), and where in it each key stands."""

    source: str
    values: Mapping[str, Any]
    places: Mapping[yaml_format.KeyPath, str] = field(default_factory=dict)


def file_layers(path: Path | str) -> list[Layer]:
    """Return the values of the file ``path`` and of the files that it inherits from, the lowest first.

    Raises:
        ConfigError: a file is missing, not a regular file, too large or no YAML mapping; it includes itself; or there
            are too many.
    """
    layers: list[Layer] = []
    _add(layers, _normal(Path(_expanded(str(path), "--config"))), ())
    return layers


def _add(layers: list[Layer], path: Path, including: tuple[Path, ...]) -> None:
    if path in including:
        raise ConfigError(f"{path}: includes itself through '{DEFAULTS_KEY}'")
    if len(layers) + len(including) >= MOST_FILES:
        raise ConfigError(f"{path}: a configuration may be made of {MOST_FILES} files through '{DEFAULTS_KEY}' at most")
    by = f" (named by '{DEFAULTS_KEY}' in {including[-1]})" if including else ""
    values, lines = yaml_format.parse(read_text(path, "configuration file", by), str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: must be a mapping of keys, not {yaml_format.inline(values)[:80]}")
    below = values.pop(DEFAULTS_KEY, [])
    names = [below] if isinstance(below, str) else below
    line = lines.get((DEFAULTS_KEY,), 1)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}:{line}: {DEFAULTS_KEY} must be a file name or a list of them")
    for name in names:
        _add(layers, _normal(path.parent / _expanded(name, f"{path}:{line}: {DEFAULTS_KEY}")), (*including, path))
    layers.append(Layer(str(path), values, {key: f"{path}:{line}" for key, line in lines.items()}))


def read_text(path: Path, what: str, by: str = "", hint: Callable[[Path], str] = lambda _: "") -> str:
    """Return the text of a file that the user names.

    Args:
        what: the kind of file, for the message about one that is missing.
        by: what names the file, for messages.
        hint: what to add to the message about a missing file, such as `rlcore.suggestions.similar_paths`.

    Raises:
        ConfigError: the file is missing, no regular file, larger than `LARGEST_FILE`, or not UTF-8.
    """
    try:
        return read_regular(path, LARGEST_FILE).decode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}{by}{hint(path)}") from None
    except OSError as error:
        raise ConfigError(f"{yaml_format.shortened(str(path), 200)}: cannot be read{by}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8
        raise ConfigError(f"{path}: cannot be read{by}: {error}") from None


def _expanded(name: str, where: str) -> str:
    try:
        return str(expanded(name))
    except PydanticCustomError as error:
        raise ConfigError(f"{where}: {error.message()}") from None


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))
