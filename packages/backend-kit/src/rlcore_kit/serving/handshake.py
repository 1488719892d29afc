"""Handshake with an inference server: what a client asks, checks and prepares before its first request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.errors import EngineError
from rlcore_kit.model_folder import files

_SHAPE = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class Handshake:
    """What a client knows of a server after the handshake.

    Attributes:
        version: of the server's weights in this run, or `weight_labels.UNKNOWN`.
        workers: number of processes that share the model.
        vocabulary: number of tokens of the model; a token outside of it in a prompt can end the server.
        end_tokens: ids that end a completion.
        model_name: name of the model in requests; empty if requests name none.
        min_p: whether the server accepts requests with min-p.
    """

    version: int
    workers: int
    vocabulary: int
    end_tokens: frozenset[int]
    model_name: str = ""
    min_p: bool = True


def check_length(url: str, maximum: int, needed: int, remedy: str) -> None:
    """Raise `EngineError` if the server accepts sequences of ``maximum`` tokens only, fewer than ``needed``.

    Args:
        remedy: options with which the server must be started.
    """
    if maximum < needed:
        raise EngineError(
            f"{url} accepts sequences of {maximum} tokens, but this run needs {needed}; start the server with "
            f"{remedy}, or shorten prompts and completions"
        )


def check_same_model(url: str, served: str, expected: str) -> None:
    """Raise `EngineError` if the folders ``served`` and ``expected`` hold models of different shapes.

    A folder that this process cannot read is not compared.
    """
    here, there = _shape(expected), _shape(served)
    if here and there and here != there:
        differences = ", ".join(
            f"{key} {there.get(key)} instead of {here.get(key)}" for key in _SHAPE if here.get(key) != there.get(key)
        )
        raise EngineError(f"{url} serves another model than {expected}: {differences}")


def _shape(model: str) -> dict[str, Any]:
    file = Path(model) / files.CONFIG
    if not file.is_file():
        return {}
    config = files.read_json(file)
    return {key: config[key] for key in _SHAPE if key in config}
