"""Arguments of SGLang's server from settings, and checks of those that a user adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlcore.engines.settings import RolloutSpec
from rlcore_kit.serving.extra_arguments import problems_of
from rlcore_sglang.adapters import trained_rank
from rlcore_sglang.settings import SGLangSettings

SERVER_FIELDS = (
    "tp_size",
    "device",
    "dtype",
    "mem_fraction_static",
    "max_total_tokens",
    "max_running_requests",
    "attention_backend",
    "sampling_backend",
)
"""Settings that are arguments of SGLang."""

OURS = {
    "model_path": "it is the policy's model",
    "tokenizer_path": "it is model.tokenizer_path",
    "trust_remote_code": "it is model.trust_remote_code",
    "context_length": "it follows from the data's longest prompt and response",
    "random_seed": "every request has a separate seed",
    "host": "servers that rlcore starts listen on loopback only",
    "port": "rlcore chooses a free one",
    "api_key": "rlcore generates one for every server",
    "served_model_name": "rlcore recognises a starting server by it",
    "weight_version": "it labels the run and version of the weights",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "dp_size": "set replicas to start several servers",
    "pp_size": "only tensor parallelism is supported",
    "speculative_algorithm": "log-probs of drafted tokens are not the policy's at every temperature",
    "enable_lora": "it is rollout.sglang.enable_lora",
    "max_lora_rank": "it follows from the policy's adapters",
}
"""Arguments that ``args`` must not hold, and why."""


def server_arguments(spec: RolloutSpec, settings: SGLangSettings, on_cpu: bool) -> dict[str, Any]:
    """Return keyword arguments of SGLang's ``ServerArgs``, without host, port, API key and name of the server."""
    chosen = {name: getattr(settings, name) for name in SERVER_FIELDS}
    chosen["dtype"] = settings.dtype or ("float32" if on_cpu else "bfloat16")
    defaults: dict[str, Any] = {
        "model_path": spec.model.path,
        "tokenizer_path": spec.model.tokenizer_path or spec.model.path,
        "trust_remote_code": spec.model.trust_remote_code,
        "context_length": spec.max_model_len,
        "random_seed": spec.seed % 2**31,
        "skip_server_warmup": True,
        "log_level": "info",
        "log_level_http": "warning",
        "enable_memory_saver": not on_cpu,
        "enable_weights_cpu_backup": not on_cpu and settings.sleep_level == 1,
    }
    if settings.enable_lora:
        defaults |= adapter_arguments(trained_rank(spec), on_cpu)
    given = {name: value for name, value in chosen.items() if value is not None}
    return {**defaults, **given, **settings.args}


def adapter_arguments(rank: int, on_cpu: bool) -> dict[str, Any]:
    """Return arguments of a server that takes adapters of ``rank``; the base model is one of two in a batch."""
    arguments = {
        "enable_lora": True,
        "max_lora_rank": rank,
        "lora_target_modules": ["all"],
        "max_loras_per_batch": 2,
    }
    return {**arguments, "lora_backend": "torch_native"} if on_cpu else arguments


def problems(extra: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Return all problems of the user's arguments ``extra``; ``known`` are the names that the installed version has."""
    return problems_of(
        extra,
        known=set(known),
        reserved=OURS,
        settings=SERVER_FIELDS,
        section="rollout.sglang",
        engine="SGLang",
        help_command="sglang serve --help",
    )
