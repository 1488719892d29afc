"""Handshake with ``vllm serve``: checks that the server can serve training, and prepares its workers."""

from __future__ import annotations

from rlcore.engines.settings import RolloutSpec
from rlcore.errors import EngineError, WorkerError
from rlcore_kit.model_folder.vocabulary import vocabulary
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.handshake import Handshake, check_length, check_same_model
from rlcore_kit.serving.weight_labels import WeightLabels
from rlcore_vllm.server.api import VLLMServerAPI
from rlcore_vllm.server.settings import ServerSettings

EXTENSION = "rlcore_vllm.server.worker.ServerWorkerExtension"
START = (
    "start it with VLLM_SERVER_DEV_MODE=1 in its environment and the options --enable-scale-out and "
    f"--worker-extension-cls {EXTENSION}"
)


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
    version = labels.take_over(api, settings.weights_timeout_s)
    return Handshake(version, workers, *vocabulary(spec.model), model_name=name)


def _model_name(connection: Connection, spec: RolloutSpec, settings: ServerSettings) -> str:
    """Return the name under which the server serves the policy's model."""
    url = connection.url
    served = {card["id"]: card for card in connection.ask("GET", "/v1/models", "list its models")["data"]}
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
