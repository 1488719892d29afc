"""vLLM's engine arguments from settings, checked against the installed version before the engine starts."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, cast

from rlcore.engines.settings import RolloutSpec
from rlcore.errors import EngineError
from rlcore_kit.serving.extra_arguments import problems_of
from rlcore_vllm.adapters import lora_arguments
from rlcore_vllm.settings import VLLMSettings

WORKER_EXTENSION = "rlcore_vllm.worker.WorkerExtension"
CPU_KV_CACHE_BYTES = 1 << 30
"""Default on the CPU, where vLLM otherwise takes nearly all of the machine's memory."""

OURS = {
    "model": "it is the policy's model",
    "tokenizer": "it is model.tokenizer_path",
    "trust_remote_code": "it is model.trust_remote_code",
    "max_model_len": "it follows from the data's longest prompt and response",
    "seed": "every request has a separate seed",
    "logprobs_mode": "rlcore returns log-probs before the filters in every mode",
    "worker_extension_cls": "it is rlcore's, which loads weights",
    "weight_transfer_config": "it is rollout.vllm.weight_transfer",
    "disable_log_stats": "rlcore does not read them",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "data_parallel_size": "its ranks share one queue and fail together; set replicas, or place several processes",
    "pipeline_parallel_size": "only tensor parallelism is supported",
    "speculative_config": "log-probs of drafted tokens are not the policy's at every temperature",
    "stream_interval": "only finished requests are returned",
    "max_lora_rank": "it follows from the policy's adapters",
    "max_loras": "the policy has one adapter",
}
"""Arguments that ``args`` must not hold, and why."""


def engine_arguments(spec: RolloutSpec, device_type: str, *, sleep_mode: bool, replica: int = 0) -> dict[str, Any]:
    """Return keyword arguments of vLLM's ``AsyncEngineArgs`` for ``spec``.

    Args:
        device_type: of the platform that vLLM chose: "cpu", "cuda" …
        sleep_mode: whether the platform can release memory.
        replica: index among the engines of this process; each takes the GPUs after those of the previous one.

    Raises:
        EngineError: ``args`` holds an argument that the installed version does not know, or that rlcore sets.
    """
    settings = cast(VLLMSettings, spec.options)
    on_cpu = device_type == "cpu"
    arguments: dict[str, Any] = {
        "model": spec.model.path,
        "tokenizer": spec.model.tokenizer_path or spec.model.path,
        "trust_remote_code": spec.model.trust_remote_code,
        "max_model_len": spec.max_model_len,
        "seed": spec.seed % 2**32,
        "dtype": settings.dtype or ("float32" if on_cpu else "bfloat16"),
        "tensor_parallel_size": settings.tensor_parallel_size,
        "distributed_executor_backend": "mp" if settings.tensor_parallel_size > 1 else "uni",
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": settings.kv_cache_memory_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None),
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "load_format": settings.load_format,
        "scheduling_policy": "priority",
        "enable_sleep_mode": sleep_mode,
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
    }
    if settings.replicas > 1 and not on_cpu:
        size = settings.tensor_parallel_size
        arguments["device_ids"] = list(range(replica * size, (replica + 1) * size))
    check_extra_arguments(settings.args)
    if settings.enable_lora:
        arguments |= lora_arguments(spec.adapter_rank)
    if settings.weight_transfer != "rlcore":
        arguments["weight_transfer_config"] = {"backend": checked_transfer(settings.weight_transfer, on_cpu)}
    given = {name: value for name, value in arguments.items() if value is not None}
    return {**given, **settings.args}


def checked_transfer(kind: str, on_cpu: bool) -> str:
    """Return ``kind``; raise `EngineError` if vLLM's weight transfer of that name cannot run here."""
    if on_cpu:
        raise EngineError(
            f"rollout.vllm.weight_transfer={kind} transfers weights between GPUs; set it to rlcore on the CPU"
        )
    if kind == "ipc" and os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION") != "1":
        raise EngineError(
            "rollout.vllm.weight_transfer=ipc makes vLLM's processes exchange pickles: allow that with the environment "
            "variable VLLM_ALLOW_INSECURE_SERIALIZATION=1, or set weight_transfer to rlcore, which uses none"
        )
    return kind


def check_extra_arguments(extra: dict[str, Any]) -> None:
    """Raise `EngineError` with all problems of the user's arguments ``extra``, and suggestions for unknown names."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    problems = problems_of(
        extra,
        known={field.name for field in dataclasses.fields(AsyncEngineArgs)},
        reserved=OURS,
        settings=VLLMSettings.model_fields.keys() - {"args"},
        section="rollout.vllm",
        engine="vLLM",
        help_command="vllm serve --help",
    )
    if problems:
        raise EngineError("rollout.vllm.args: " + "; ".join(problems))
