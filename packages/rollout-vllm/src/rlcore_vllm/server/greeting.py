"""What a client finds out about a server before it asks it for anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlcore.engines.settings import RolloutSpec
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.model import check_same_model, vocabulary
from rlcore_kit.serving.versions import Versions
from rlcore_vllm.server.settings import ServerSettings

EXTENSION = "rlcore_vllm.server.worker.ServerWorkerExtension"
START = (
    "start it with VLLM_SERVER_DEV_MODE=1 in its environment and the options --enable-scale-out and "
    f"--worker-extension-cls {EXTENSION}"
)


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
    _prepare(connection)
    version = _adopt(connection, label, versions, settings.weights_timeout_s)
    return Greeting(name, version, workers, *vocabulary(spec.model))


def _adopt(connection: Connection, label: str, versions: Versions, timeout_s: float) -> int:
    def read_again() -> None:
        _post(connection, "/pause", "pause", mode="keep")
        body = {"method": "rlcore_restore"}
        connection.ask("POST", "/collective_rpc", "read its model's files again", body=body, timeout_s=timeout_s)
        _post(connection, "/reset_prefix_cache", "reset its prefix cache", reset_running_requests="true")

    def name(label: str) -> None:
        _post(connection, "/update_weight_version", "label its weights", {"new_version": label})

    def go_on() -> None:
        _post(connection, "/resume", "resume")

    return versions.adopt(connection.url, label, read_again=read_again, name=name, go_on=go_on)


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
    check_same_model(url, str(served[name].get("root")), spec.model.path)
    return name


def _prepare(connection: Connection) -> None:
    """Have the workers return log-probs as the contract wants them."""
    try:
        _post(connection, "/collective_rpc", "prepare its workers", {"method": "rlcore_prepare"})
    except WorkerError as error:
        if "has no attribute" in str(error):
            raise EngineError(
                f"{connection.url} has workers without rlcore's extension, so its log-probs are not those of the "
                f"sampling temperature and it takes no weights; {START}"
            ) from error
        raise


def _post(connection: Connection, path: str, what: str, body: Any = None, **params: str) -> None:
    connection.ask("POST", path, what, params=params, body=body)
