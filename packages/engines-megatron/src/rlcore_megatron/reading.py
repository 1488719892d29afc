"""The tensors of a Hugging Face model folder, read in slices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from rlcore.errors import EngineError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The safetensors files of a model folder, open for reading; tensors are mapped into memory, not read whole.

    Raises:
        EngineError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        index = folder / INDEX
        if index.is_file():
            self._files = _index(index)
        else:
            self._files = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def shape(self, name: str) -> torch.Size:
        with self._damage_named(name):
            return torch.Size(self._file(self._files[name]).get_slice(name).get_shape())

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """A tensor, or only ``[start, stop)`` of its dimension ``dim``; on the CPU, in the precision of the file."""
        with self._damage_named(name):
            file = self._file(self._files[name])
            if dim is None:
                return file.get_tensor(name)  # type: ignore[no-any-return]
            index = (slice(None),) * dim + (slice(start, stop),)
            return file.get_slice(name)[index]  # type: ignore[no-any-return]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            if not path.is_file():
                named = f", which its {INDEX} names" if (self.folder / INDEX).is_file() else f" and no {INDEX}"
                raise EngineError(f"model folder {self.folder} has no {name}{named}")
            try:
                self._open[name] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise EngineError(f"{path} is damaged: {error}") from error
        return self._open[name]

    @contextmanager
    def _damage_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{name} in {self.folder / self._files[name]} cannot be read: {error}") from error


def _index(path: Path) -> dict[str, str]:
    """The file of every tensor."""
    try:
        files = json.loads(path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path} is no index of weights: {error}") from error
    return dict(files)
