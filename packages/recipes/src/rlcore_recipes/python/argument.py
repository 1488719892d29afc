"""An argument of `rlcore.train` on its way into the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.errors import ConfigError


@dataclass(frozen=True)
class Argument:
    """What an argument means to the configuration, and the files that it needs.

    Attributes:
        values: takes the folder of the run's inputs and returns values by dotted key.
        files: by its name in that folder, what writes each file to a path.
    """

    values: Callable[[Path], Mapping[str, Any]]
    files: Mapping[str, Callable[[Path], object]]

    def write(self, folder: Path) -> None:
        """Write the files, each as a whole."""
        for name, write in self.files.items():
            unfinished = folder / f".{os.getpid()}.{name}"
            try:
                with boundary(f"{folder / name} cannot be written", ConfigError):
                    folder.mkdir(parents=True, exist_ok=True)
                    write(unfinished)
                    unfinished.replace(folder / name)
            finally:
                unfinished.unlink(missing_ok=True)


def model_argument(model: object) -> Argument:
    """Return what ``model=`` means.

    Raises:
        ConfigError: it is an object, such as a model that is loaded.
    """
    if isinstance(model, (str, os.PathLike)):
        path = os.fspath(model)
        return Argument(lambda folder: {"model.path": path}, {})
    loaded_from = getattr(model, "name_or_path", None)
    hint = (
        f"; this one was loaded from {loaded_from!r}"
        if isinstance(loaded_from, str) and loaded_from
        else "; write an object with its save_pretrained, together with its tokenizer"
    )
    raise ConfigError(
        f"model= must be a folder or a name on the Hub, because the run's engines load the model, not a "
        f"{type(model).__name__}{hint}"
    )
