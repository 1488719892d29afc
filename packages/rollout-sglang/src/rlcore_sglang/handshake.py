"""Handshake with an SGLang server: checks that it serves the policy's model, and finds out what it can do."""

from __future__ import annotations

import logging
from typing import Any, cast

from rlcore.engines.settings import RolloutSpec
from rlcore.errors import EngineError
from rlcore_kit.model_folder.vocabulary import vocabulary
from rlcore_kit.serving.handshake import Handshake, check_length, check_same_model
from rlcore_kit.serving.weight_labels import WeightLabels
from rlcore_sglang.adapters import check_server, trained_rank
from rlcore_sglang.api import SGLangServerAPI
from rlcore_sglang.quirks import CONTEXT_SLACK
from rlcore_sglang.sampler import NAME
from rlcore_sglang.settings import SGLangSettings

logger = logging.getLogger(__name__)


def shake_hands(
    api: SGLangServerAPI, spec: RolloutSpec, labels: WeightLabels, *, sampling_backend: str | None, timeout_s: float
) -> Handshake:
    """Check the server, and label its weights.

    Args:
        sampling_backend: with which this process started the server; None if it ran already.
        timeout_s: timeout for the server to load its model's files again.

    Raises:
        WorkerError: the server is gone or broken.
        EngineError: it serves another model or a shorter ``max_model_len``.
    """
    url = api.connection.url
    info = api.connection.ask("GET", "/server_info", "report its settings")
    try:
        api.weight_label()
        served, workers, maximum = str(info["model_path"]), int(info["tp_size"]), int(info["max_req_input_len"]) + 1
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{url} does not answer as an SGLang server of version 0.5.21 or newer: {error!r}") from error
    check_same_model(url, served, spec.model.path)
    remedy = (
        f"--context-length {spec.max_model_len + CONTEXT_SLACK} and a KV cache of that size (--max-total-tokens, "
        "--mem-fraction-static)"
    )
    check_length(url, maximum, spec.max_model_len, remedy)
    if cast(SGLangSettings, spec.options).enable_lora:
        check_server(url, info, trained_rank(spec))
    deterministic = bool(info.get("enable_deterministic_inference"))
    seeded = _uses_seeds(info, sampling_backend)
    if not (seeded or deterministic):
        logger.warning("%s ignores seeds; start it with --sampling-backend %s", url, NAME)
    version = labels.take_over(api, timeout_s)
    return Handshake(version, workers, *vocabulary(spec.model), min_p=seeded or not deterministic)


def _uses_seeds(info: dict[str, Any], sampling_backend: str | None) -> bool:
    """Return whether the server uses rlcore's sampling backend.

    Its settings do not say so on the CPU, where SGLang calls every backend "pytorch"; its command line does.
    """
    if sampling_backend is not None:
        return sampling_backend == NAME
    words = f"{info.get('launch_command') or ''} ".replace("=", " ")
    return info.get("sampling_backend") == NAME or f"--sampling-backend {NAME} " in words
