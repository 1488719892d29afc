"""The tokenizer of a model, for engines that look for stop strings or send prompts as text."""

from __future__ import annotations

from typing import Any

from rlcore.boundary import boundary
from rlcore.engines import ModelSettings
from rlcore.errors import EngineError


def load_tokenizer(model: ModelSettings) -> Any:
    """Load the tokenizer of ``model`` with transformers.

    Raises:
        EngineError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = model.tokenizer_path or model.path
    with boundary(f"the tokenizer of {source!r} cannot be loaded", EngineError):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
