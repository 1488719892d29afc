"""Handshake with ``vllm serve``: checks that the server can serve training, and prepares its workers."""

from __future__ import annotations

from typing import Any, cast

from rlcore.engines.settings import RolloutSpec
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.model_folder.vocabulary import vocabulary
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.handshake import Handshake, check_length, check_same_model
from rlcore_kit.serving.weight_labels import WeightLabels
from rlcore_vllm.adapters import trained_rank
from rlcore_vllm.server.api import VLLMServerAPI
from rlcore_vllm.server.settings import ServerSettings
from rlcore_vllm.settings import VLLMSettings

EXTENSION = "rlcore_vllm.server.worker.ServerWorkerExtension"
START = (
    "start it with VLLM_SERVER_DEV_MODE=1 in its environment and the options --enable-scale-out and "
    f"--worker-extension-cls {EXTENSION}"
)

START_LORA = (
    "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and the options --enable-lora and "
    "--max-lora-rank (8, 16, 32 …, at least the policy's rank)"
)
ADAPTER = "rlcore-policy"
"""Name of the policy's adapter on servers."""


def shake_hands(api: VLLMServerAPI, spec: RolloutSpec, settings: ServerSettings, labels: WeightLabels) -> Handshake:
    """Check and prepare the server.

    Raises:
        WorkerError: the server is gone or broken.
        EngineError: it serves another model, a shorter ``max_model_len``, or was not started for training.
    """
    connection = api.connection
    connection.ask("GET", "/health", "report its health")
    name = _model_name(connection, spec, settings)
    try:
        api.weight_label()
        workers = int(connection.ask("GET", "/get_world_size", "report its number of workers")["world_size"])
    except EngineError as error:
        raise EngineError(f"{connection.url} cannot be controlled; {START} ({error})") from error
    _prepare_workers(api)
    name = _prepare_adapters(api, spec, name)
    version = labels.take_over(api, settings.weights_timeout_s)
    return Handshake(version, workers, *vocabulary(spec.model), model_name=name)


def _model_name(connection: Connection, spec: RolloutSpec, settings: ServerSettings) -> str:
    """Return the name under which the server serves the policy's model."""
    url = connection.url
    served = {name: card for name, card in _served(connection).items() if card.get("parent") is None}
    if settings.model_name is not None and settings.model_name not in served:
        raise EngineError(f"{url} serves {', '.join(served)}, not {settings.model_name} (model_name)")
    if settings.model_name is None and len(served) != 1:
        raise EngineError(f"{url} serves {', '.join(served) or 'no model'}; choose one with model_name")
    name = settings.model_name or next(iter(served))
    maximum = served[name].get("max_model_len")
    if maximum is not None:
        check_length(url, maximum, spec.max_model_len, f"--max-model-len {spec.max_model_len}")
    check_same_model(url, str(served[name].get("root")), spec.model.path)
    return name


def _prepare_adapters(api: VLLMServerAPI, spec: RolloutSpec, name: str) -> str:
    """Have updates bring what the settings say; return the name that requests give: the adapter's, or the model's.

    Raises:
        EngineError: the server was not started for adapters of this rank.
    """
    options, url = cast(VLLMSettings, spec.options), api.connection.url
    limits = api.call_workers("rlcore_take_adapters", options.enable_lora, what="prepare its workers")
    if not options.enable_lora:
        return name
    rank = trained_rank(spec.adapter_rank)
    if rank > int(limits[0]):
        limit = f"takes adapters of rank {limits[0]} at most" if int(limits[0]) else "takes no adapters"
        raise EngineError(f"{url} {limit}, and the policy trains adapters of rank {rank}; {START_LORA}")
    if ADAPTER not in _served(api.connection):
        folder = api.call_workers("rlcore_offer_adapter", what="write an adapter")[0]
        try:
            api.load_adapter(ADAPTER, folder)
        except EngineError as error:
            raise EngineError(f"{url} does not load adapters while it runs; {START_LORA} ({error})") from error
        api.call_workers("rlcore_adopt_adapter", what="use the adapter")
    return ADAPTER


def _served(connection: Connection) -> dict[str, Any]:
    """Return vLLM's descriptions of the models and adapters that the server serves, by name."""
    return {card["id"]: card for card in connection.ask("GET", "/v1/models", "list its models")["data"]}


def _prepare_workers(api: VLLMServerAPI) -> None:
    """Have the workers return log-probs as `rlcore.engines.SamplingParams` defines them."""
    try:
        api.call_workers("rlcore_prepare", what="prepare its workers")
    except WorkerError as error:
        if "has no attribute" in str(error):
            raise EngineError(
                f"{api.connection.url} has workers without rlcore's extension, so its log-probs are not those of the "
                f"sampling temperature and it accepts no weights; {START}"
            ) from error
        raise
