"""What a client finds out about a server before it asks it for anything."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from rlcore.engines.settings import RolloutSpec
from rlcore.errors import EngineError
from rlcore_kit.serving.connection import Connection
from rlcore_kit.serving.model import check_same_model, vocabulary
from rlcore_kit.serving.versions import Versions
from rlcore_sglang.quirks import CONTEXT_SLACK
from rlcore_sglang.sampler import NAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Greeting:
    """A server that can serve.

    Attributes:
        version: of its weights, as far as this run knows them.
        workers: processes among which it divides the model.
        vocabulary: number of tokens that the model knows.
        end_tokens: that end a completion.
        min_p: whether it bears requests with min-p.
    """

    version: int
    workers: int
    vocabulary: int
    end_tokens: frozenset[int]
    min_p: bool


def greet(
    connection: Connection, spec: RolloutSpec, versions: Versions, *, ours: str | None, timeout_s: float
) -> Greeting:
    """Ask the server who it is, and label its weights.

    Args:
        timeout_s: longest wait for it to read its model's files again.
        ours: the sampling backend with which we started it; None if it ran already.

    Raises:
        WorkerError: it is not there, or not well.
        EngineError: it serves another model or a shorter ``max_model_len``.
    """
    url = connection.url
    model = connection.ask("GET", "/model_info", "tell its weights' version")
    about = connection.ask("GET", "/server_info", "tell its settings")
    try:
        # of the two only the settings name the model that it was started with; the other is what it read last
        label, served, workers = str(model["weight_version"]), str(about["model_path"]), int(about["tp_size"])
        longest = int(about["max_req_input_len"]) + 1
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{url} does not answer as an SGLang server of version 0.5.21 or newer: {error!r}") from error
    check_same_model(url, served, spec.model.path)
    if longest < spec.max_model_len:
        raise EngineError(
            f"{url} takes sequences of {longest} tokens, but {spec.max_model_len} are wanted; start it with "
            f"--context-length {spec.max_model_len + CONTEXT_SLACK} and room for them in its KV cache "
            "(--max-total-tokens, --mem-fraction-static), or shorten prompts and completions"
        )
    deterministic = bool(about.get("enable_deterministic_inference"))
    seeded = _seeded(about, ours)
    if not (seeded or deterministic):
        logger.warning("%s ignores seeds; start it with --sampling-backend %s", url, NAME)
    version = _adopt(connection, label, served, versions, timeout_s)
    return Greeting(version, workers, *vocabulary(spec.model), min_p=seeded or not deterministic)


def _seeded(about: dict[str, Any], ours: str | None) -> bool:
    """Whether requests' seeds count. Settings do not tell on the CPU, where SGLang calls every backend "pytorch"."""
    if ours is not None:
        return ours == NAME
    words = f"{about.get('launch_command') or ''} ".replace("=", " ")
    return about.get("sampling_backend") == NAME or f"--sampling-backend {NAME} " in words


def _adopt(connection: Connection, label: str, served: str, versions: Versions, timeout_s: float) -> int:
    def read_again() -> None:
        connection.ask("POST", "/pause_generation", "pause", body={"mode": "retract"})
        body = {"model_path": served}
        connection.ask("POST", "/update_weights_from_disk", f"read {served} again", body=body, timeout_s=timeout_s)

    def name(label: str) -> None:
        body = {"new_version": label, "abort_all_requests": False}
        connection.ask("POST", "/update_weight_version", "label its weights", body=body)

    def go_on() -> None:
        connection.ask("POST", "/continue_generation", "go on", body={})

    return versions.adopt(connection.url, label, read_again=read_again, name=name, go_on=go_on)
