"""Habits of servers that the engine works around, each with the version and the reason."""

from __future__ import annotations

from rlcore.engines.settings import ModelSettings
from rlcore.errors import EngineError
from rlcore_kit.model_folder.files import CONFIG, optional_file, read_json
from rlcore_kit.serving.connection import Connection


def check_vllm_reload(connection: Connection, model: ModelSettings) -> None:
    """Raise `EngineError` where vLLM's ``reload_weights`` would give a mixture of weights.

    On the CPU (0.32) the output layer computes with a packed copy of its tied embedding, which a reload leaves alone.
    """
    params = {"config_format": "json"}
    info = connection.ask("GET", "/server_info", "report its settings", params=params)
    file = optional_file(model, CONFIG)
    tied = file is not None and read_json(file).get("tie_word_embeddings")
    if tied and str(info["vllm_config"]["device_config"]["device"]) == "cpu":
        raise EngineError(
            f"{connection.url} is vLLM on the CPU, whose reload leaves the old weights in the output layer of models "
            "with tied embeddings; take rollout.engine=vllm with rollout.vllm.mode=server"
        )


def named_by_sglang(name: int, token: int) -> bool:
    """Return whether SGLang (0.5.21) means ``token`` with ``name`` among the log-probs of a prompt.

    It names the last token of the model's vocabulary 0, though its log-prob is right.
    """
    return name in (token, 0)
