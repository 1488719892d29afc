"""Reading a Hugging Face model folder: its configuration, and its tensors in slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rlcore.boundary import boundary
from rlcore.engines import ModelSettings
from rlcore.engines.settings import Head
from rlcore.errors import EngineError
from rlcore_kit.model_folder import files
from rlcore_kit.model_folder.loading import read_config

_FETCHED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def find_model(settings: ModelSettings, head: Head, new_head: bool = False, head_outputs: int = 1) -> tuple[Path, Any]:
    """Return the model's folder, fetched from the Hub if it is not local, and its configuration.

    Raises:
        EngineError: the folder is missing or incomplete, or a file of it is damaged.
    """
    folder = files.model_folder(settings) or _fetch(settings)
    local = settings.model_copy(update={"path": str(folder), "trust_remote_code": False})
    return folder, read_config(local, head, new_head, head_outputs)


def _fetch(settings: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    name = settings.path
    with boundary(f"model {name!r} is not a local folder and cannot be fetched from the Hub", EngineError):
        fetched = settings.model_copy(update={"path": snapshot_download(name, allow_patterns=_FETCHED)})
    found = files.model_folder(fetched)
    assert found is not None
    return found


class ModelFolder:
    """The safetensors files of a model folder, open for reading; tensors are mapped into memory and read in slices.

    Raises:
        EngineError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._open: dict[Path, Any] = {}
        self._headers = files.tensors(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._headers)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor, from the header of its file."""
        return torch.Size(self._headers[name].shape)

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        """Read a tensor, or ``[start, stop)`` of its dimension ``dim``, to the CPU in the precision of the file."""
        path = self._headers[name].file
        with boundary(f"{name} in {path} cannot be read", EngineError):
            if path not in self._open:
                self._open[path] = safe_open(path, "pt")
            file = self._open[path]
            if dim is None:
                return file.get_tensor(name)  # type: ignore[no-any-return]
            index = (slice(None),) * dim + (slice(start, stop),)
            return file.get_slice(name)[index]  # type: ignore[no-any-return]
