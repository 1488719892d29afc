"""The tensors of a Hugging Face model folder, read in slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rlcore.boundary import boundary
from rlcore.engines import model_files
from rlcore.errors import EngineError


class Checkpoint:
    """The safetensors files of a model folder, open for reading; tensors are mapped into memory, not read whole.

    Raises:
        EngineError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._open: dict[Path, Any] = {}
        self._headers = model_files.tensors(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._headers)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._headers[name].shape)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """A tensor, or only ``[start, stop)`` of its dimension ``dim``; on the CPU, in the precision of the file."""
        path = self._headers[name].file
        with boundary(f"{name} in {path} cannot be read", EngineError):
            if path not in self._open:
                self._open[path] = safe_open(path, "pt")
            file = self._open[path]
            if dim is None:
                return file.get_tensor(name)  # type: ignore[no-any-return]
            index = (slice(None),) * dim + (slice(start, stop),)
            return file.get_slice(name)[index]  # type: ignore[no-any-return]
