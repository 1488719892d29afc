"""Facts about a model without its weights: number of tokens, tokens that end a completion, number of positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.engines.settings import ModelSettings
from rlcore.errors import EngineError
from rlcore_kit.model_folder import files
from rlcore_kit.model_folder.length import longest_position


def vocabulary(model: ModelSettings) -> tuple[int, frozenset[int]]:
    """Return the model's number of tokens, and the ids that end a completion.

    Raises:
        EngineError: its configuration cannot be read, or names end tokens that are no tokens.
    """
    with boundary(f"cannot read the configuration of the model {model.path}", EngineError):
        size = int(_configuration(model).get_text_config().vocab_size)
    return size, frozenset(files.end_tokens(model, size).ids)


def positions(model: ModelSettings) -> int | None:
    """Return the maximum number of tokens of a sequence; None if the model's files do not say it.

    Raises:
        EngineError: its configuration cannot be read.
    """
    with boundary(f"cannot read the configuration of the model {model.path}", EngineError):
        return longest_position(_configuration(model))


def _configuration(model: ModelSettings) -> Any:
    from transformers import AutoConfig

    folder = Path(model.path).expanduser()
    source = str(folder) if folder.is_dir() else model.path
    return AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code)
