"""What this process can read about the model that a server should serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlcore.boundary import boundary
from rlcore.engines.settings import ModelSettings
from rlcore.errors import EngineError
from rlcore_kit.model_folder import files

_SHAPE = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers")


def vocabulary(model: ModelSettings) -> tuple[int, frozenset[int]]:
    """The model's number of tokens, and those that end a completion.

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
    file = Path(model) / files.CONFIG
    if not file.is_file():
        return {}
    config = files.read_json(file)
    return {key: config[key] for key in _SHAPE if key in config}
