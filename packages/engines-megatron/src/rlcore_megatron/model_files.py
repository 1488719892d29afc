"""The model's folder: its configuration, and one clear sentence when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from rlcore.engines import ModelSettings
from rlcore.engines.settings import model_folder
from rlcore.errors import EngineError


def find_model(settings: ModelSettings) -> tuple[Path, Any]:
    """The model's folder, fetched from the Hub if need be, and its configuration.

    Raises:
        EngineError: the folder is missing, or has no configuration or no weights.
    """
    path = model_folder(settings) or _fetch(settings.path)
    try:
        return path, AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EngineError(f"model {settings.path!r} cannot be read: {_first_line(error)}") from error


def has_tensor(folder: Path, name: str) -> bool:
    """Whether a weight file in ``folder`` holds ``name``."""
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    return True
        except SafetensorError as error:
            raise EngineError(f"{file} is damaged: {error}") from error
    return False


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise EngineError(
            f"model {name!r} is no folder here and cannot be fetched from the Hub: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
