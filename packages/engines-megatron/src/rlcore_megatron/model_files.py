"""The model's folder: its configuration, and one clear sentence when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from rlcore.boundary import boundary
from rlcore.engines import ModelSettings, model_checks, model_files
from rlcore.engines.settings import Head
from rlcore.errors import EngineError

_FETCHED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def find_model(settings: ModelSettings, head: Head) -> tuple[Path, Any]:
    """The model's folder, fetched from the Hub if need be, and its configuration.

    Raises:
        EngineError: the folder is missing or incomplete, or a file of it is damaged.
    """
    path = model_files.model_folder(settings) or _fetch(settings)
    model_checks.check_config_file(path)
    with boundary(f"model {settings.path!r} cannot be read", EngineError):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        model_checks.check_files(settings, config, head, path)
    return path, config


def _fetch(settings: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    name = settings.path
    with boundary(f"model {name!r} is no folder here and cannot be fetched from the Hub", EngineError):
        fetched = settings.model_copy(update={"path": snapshot_download(name, allow_patterns=_FETCHED)})
    found = model_files.model_folder(fetched)
    assert found is not None
    return found
