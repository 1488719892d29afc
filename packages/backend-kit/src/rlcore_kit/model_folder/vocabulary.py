"""Vocabulary of a model: number of tokens, and tokens that end a completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.engines.settings import ModelSettings
from rlcore.errors import EngineError
from rlcore_kit.model_folder import files


def vocabulary(model: ModelSettings) -> tuple[int, frozenset[int]]:
    """Return the model's number of tokens, and the ids that end a completion.

    Raises:
        EngineError: its configuration cannot be read, or names end tokens that are no tokens.
    """
    from transformers import AutoConfig

    folder = Path(model.path).expanduser()
    source = str(folder) if folder.is_dir() else model.path
    with boundary(f"cannot read the configuration of the model {model.path}", EngineError):
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code)
        size = int(config.get_text_config().vocab_size)
    return size, frozenset(files.end_tokens(model, size).ids)
