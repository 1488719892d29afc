"""The tensors of a Hugging Face model folder, read in slices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from rlcore.engines.settings import names_a_folder
from rlcore.errors import EngineError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def locate(model: str) -> Path:
    """The folder of a model, whose weights are fetched from the Hub if it is no folder here.

    Raises:
        EngineError: there are no weights in safetensors format, here or on the Hub.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
            raise EngineError(f"model folder {folder} has no weights ({SINGLE} or {INDEX})")
        return folder
    if names_a_folder(model):
        raise EngineError(f"model folder {folder} does not exist")
    try:
        index = cached_file(model, INDEX)
    except OSError:
        index = None  # a small model, in one file
    try:
        if index is None:
            return Path(_fetched(model, SINGLE)).parent
        for file in sorted(set(_index(Path(index)).values())):
            _fetched(model, file)
        return Path(index).parent
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(f"model {model!r} is no folder here and cannot be fetched from the Hub: {reason}") from error


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
                raise EngineError(f"model folder {self.folder} has no {name}, which its {INDEX} names")
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


def _fetched(model: str, file: str) -> str:
    path = cached_file(model, file)
    if path is None:
        raise OSError(f"it has no {file}")
    return str(path)
