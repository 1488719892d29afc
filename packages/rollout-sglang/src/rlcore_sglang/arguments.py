"""From settings to the arguments of SGLang's server, and what is wrong with those that a user adds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from rlcore.engines.settings import RolloutSpec
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
"""Settings that are SGLang's own arguments."""

OURS = {
    "model_path": "it is the policy's model",
    "tokenizer_path": "it is model.tokenizer_path",
    "trust_remote_code": "it is model.trust_remote_code",
    "context_length": "it follows from the data's longest prompt and response",
    "random_seed": "every request has a seed of its own",
    "host": "servers that are started here listen on this machine alone",
    "port": "a free one is taken",
    "api_key": "every server gets one of its own",
    "served_model_name": "a server is known by it while it starts",
    "weight_version": "it tells which run's weights a server holds",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "dp_size": "several servers are replicas",
    "pp_size": "only tensor parallelism is supported",
    "speculative_algorithm": "log-probs of drafted tokens are not those of the policy at every temperature",
    "enable_lora": "the whole weights are updated",
}
"""Arguments that settings do not take in ``args``, and why."""


def server_arguments(spec: RolloutSpec, settings: SGLangSettings, on_cpu: bool) -> dict[str, Any]:
    """Keyword arguments of SGLang's ``ServerArgs``, without those of the place where the server runs."""
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
    given = {name: value for name, value in chosen.items() if value is not None}
    return {**defaults, **given, **settings.args}


def problems(extra: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """All that is wrong with the user's further arguments, where the installed version knows ``known``."""
    known = sorted(known)
    found = []
    for name in extra:
        if name in OURS:
            found.append(f"{name} cannot be set: {OURS[name]}")
        elif name in SERVER_FIELDS:
            found.append(f"{name} is an option of its own: set {name} instead of args.{name}")
        elif name not in known:
            close = get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see `sglang serve --help` for what it knows"
            found.append(f"the installed SGLang has no argument {name}; {hint}")
    return found
