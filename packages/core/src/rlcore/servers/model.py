"""What this process can read about the model that a server should serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlcore.engines.settings import ModelSettings
from rlcore.errors import EngineError

_SHAPE = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers")


def vocabulary(model: ModelSettings) -> tuple[int, frozenset[int]]:
    """The model's number of tokens, and those that end a completion.

    Raises:
        EngineError: its configuration cannot be read.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        config: Any = AutoConfig.from_pretrained(
            model.path, trust_remote_code=model.trust_remote_code
        ).get_text_config()
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the configuration of the model {model.path}: {error}") from error
    try:
        tokens = GenerationConfig.from_pretrained(model.path).eos_token_id
    except OSError:
        tokens = None
    if tokens is None:
        tokens = config.eos_token_id
    ends = [] if tokens is None else [tokens] if isinstance(tokens, int) else tokens
    return int(config.vocab_size), frozenset(ends)


def check_same_model(url: str, served: str, wanted: str) -> None:
    """Raise `EngineError` if the folders ``served`` and ``wanted`` hold models of different shapes.

    Folders that this process cannot read are taken for the right ones.
    """
    here, there = _shape(wanted), _shape(served)
    if here and there and here != there:
        differing = ", ".join(
            f"{key} {there.get(key)} instead of {here.get(key)}" for key in _SHAPE if here.get(key) != there.get(key)
        )
        raise EngineError(f"{url} serves another model than {wanted}: {differing}")


def _shape(model: str) -> dict[str, Any]:
    file = Path(model) / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    return {key: config[key] for key in _SHAPE if key in config}
