"""What a client finds out about a server before it asks it for anything."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcore.engines.settings import RolloutSpec
from rlcore.errors import EngineError, WorkerError
from rlcore_vllm.server.connection import Connection
from rlcore_vllm.server.settings import ServerSettings
from rlcore_vllm.server.versions import FRESH, UNKNOWN, Versions

logger = logging.getLogger(__name__)

EXTENSION = "rlcore_vllm.server.worker.ServerWorkerExtension"
START = (
    "start it with VLLM_SERVER_DEV_MODE=1 in its environment and the options --enable-scale-out and "
    f"--worker-extension-cls {EXTENSION}"
)
_SHAPE = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class Greeting:
    """A server that can serve.

    Attributes:
        name: of the model, in requests.
        version: of its weights, as far as this run knows them.
        workers: processes among which it divides the model.
        vocabulary: tokens that the model knows; another one in a prompt can end the server.
        end_tokens: that end a completion.
    """

    name: str
    version: int
    workers: int
    vocabulary: int
    end_tokens: frozenset[int]


def greet(connection: Connection, spec: RolloutSpec, settings: ServerSettings, versions: Versions) -> Greeting:
    """Ask the server who it is, and prepare it.

    Raises:
        WorkerError: it is not there, or not well.
        EngineError: it serves another model, a shorter ``max_model_len``, or was not started for training.
    """
    connection.ask("GET", "/health", "say whether it is well")
    name = _model(connection, spec, settings)
    try:
        label = str(connection.ask("GET", "/weight_info", "tell its weights' version")["weight_version"])
        workers = int(connection.ask("GET", "/get_world_size", "tell its number of workers")["world_size"])
    except EngineError as error:
        raise EngineError(f"{connection.url} cannot be controlled; {START} ({error})") from error
    first = connection.url not in versions.greeted
    _prepare(connection, fresh=label == FRESH)
    version = versions.number(label)
    if label == FRESH or (first and version == UNKNOWN):
        if label != FRESH:
            logger.warning("%s holds weights of an earlier run (%s) until the first update", connection.url, label)
        _post(connection, "/update_weight_version", "label its weights", {"new_version": versions.label(0)})
        version = 0
    if version != UNKNOWN:  # a client that died may have left it paused; a mixture of weights must stay so
        _post(connection, "/resume", "resume", None)
    versions.greeted.add(connection.url)
    return Greeting(name, version, workers, *_vocabulary(spec))


def _model(connection: Connection, spec: RolloutSpec, settings: ServerSettings) -> str:
    """The served model's name, if it is the one that is wanted."""
    url = connection.url
    served = {card["id"]: card for card in connection.ask("GET", "/v1/models", "name its models")["data"]}
    if settings.model_name is not None and settings.model_name not in served:
        raise EngineError(f"{url} serves {', '.join(served)}, not {settings.model_name} (model_name)")
    if settings.model_name is None and len(served) != 1:
        raise EngineError(f"{url} serves {', '.join(served) or 'no model'}; choose one by model_name")
    name = settings.model_name or next(iter(served))
    longest = served[name].get("max_model_len")
    if longest is not None and longest < spec.max_model_len:
        raise EngineError(
            f"{url} takes sequences of {longest} tokens, but {spec.max_model_len} are wanted; start it with "
            f"--max-model-len {spec.max_model_len}, or shorten prompts and completions"
        )
    here, there = _shape(spec.model.path), _shape(str(served[name].get("root")))
    if here and there and here != there:
        differing = ", ".join(
            f"{key} {there.get(key)} instead of {here.get(key)}" for key in _SHAPE if here.get(key) != there.get(key)
        )
        raise EngineError(f"{url} serves another model than {spec.model.path}: {differing}")
    return name


def _shape(model: str) -> dict[str, Any]:
    """What tells models apart, of a folder that this process can read; empty for others."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    return {key: config[key] for key in _SHAPE if key in config}


def _prepare(connection: Connection, *, fresh: bool) -> None:
    """Have the workers return log-probs as the contract wants them."""
    method = "rlcore_prepare" if fresh else "rlcore_version"
    try:
        _post(connection, "/collective_rpc", "prepare its workers", {"method": method})
    except WorkerError as error:
        if "has no attribute" in str(error):
            raise EngineError(
                f"{connection.url} has workers without rlcore's extension, so its log-probs are not those of the "
                f"sampling temperature and it takes no weights; {START}"
            ) from error
        raise


def _post(connection: Connection, path: str, what: str, body: Any) -> None:
    connection.ask("POST", path, what, body=body)


def _vocabulary(spec: RolloutSpec) -> tuple[int, frozenset[int]]:
    """The model's number of tokens, and those that end a completion."""
    from transformers import AutoConfig, GenerationConfig

    path, trusted = spec.model.path, spec.model.trust_remote_code
    try:
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=trusted).get_text_config()
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot read the configuration of the model {path}: {error}") from error
    try:
        tokens = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        tokens = None
    if tokens is None:
        tokens = config.eos_token_id
    ends = [] if tokens is None else [tokens] if isinstance(tokens, int) else tokens
    return int(config.vocab_size), frozenset(ends)
