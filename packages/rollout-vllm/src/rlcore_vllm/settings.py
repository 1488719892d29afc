"""Settings of the vLLM rollout engine. Imports neither torch nor vllm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rlcore.config import Config, Package, Seconds
from rlcore_vllm.server.settings import ServerSettings


class VLLMSettings(Config):
    """Where vLLM runs, and its arguments under the names that ``vllm serve`` gives them.

    Common arguments are fields; ``args`` takes all others that the installed version knows.
    """

    mode: Literal["in_process", "process", "server"] = Field(
        "in_process",
        description="'in_process' runs vLLM on a thread of this process, 'process' in a separate process, 'server' "
        "uses running servers (see server).",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=2**16,
        description="Number of engines of mode 'process', each on separate GPUs; requests are balanced over them.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=2**16, description="Number of processes (GPUs) that share each layer."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Precision of weights and activations; null is bfloat16 on a GPU and float32 on the CPU."
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Fraction of the GPU's memory for weights, activations and KV cache; null is vLLM's default.",
    )
    kv_cache_memory_bytes: int | None = Field(
        None,
        gt=0,
        le=2**50,
        description="Size of the KV cache per worker in bytes; null follows gpu_memory_utilization (CPU: 1 GiB).",
    )
    max_num_seqs: int = Field(256, ge=1, description="Maximum number of concurrent sequences; further requests wait.")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Maximum number of tokens in one step; null is vLLM's default."
    )
    enforce_eager: bool | None = Field(
        None,
        description="true runs the model eagerly; false compiles it and captures CUDA graphs, which starts slower and "
        "runs faster. null is false on a GPU and true on the CPU.",
    )
    enable_prefix_caching: bool = Field(True, description="Prefill the common prefix of requests once.")
    load_format: str = Field(
        "auto",
        description="How vLLM reads the model's files; 'dummy' reads none, for a run that sends weights before it "
        "generates.",
    )
    enable_lora: bool = Field(
        False,
        description="Update the policy's LoRA adapters instead of full weights, for a policy that trains adapters; the "
        "base weights are those of model.path.",
    )
    sleep_level: Literal[1, 2] = Field(
        1,
        description="What sleep does with the weights: 1 moves them to host memory, 2 drops them until an update.",
    )
    rejoin_timeout_s: Seconds = Field(
        300.0, gt=0, description="Timeout of requests while no replica is available, in seconds."
    )
    start_timeout_s: Seconds = Field(600.0, gt=0, description="Timeout of the engine's start in seconds.")
    weight_transfer: Literal["rlcore", "nccl", "ipc"] = Field(
        "rlcore",
        description="How weights are moved from this process to engines of mode 'process': by rlcore's transfer, or by "
        "vLLM's weight-transfer engines 'nccl' (other GPUs than the trainer's) or 'ipc' (the trainer's GPU).",
    )
    update_timeout_s: Seconds = Field(300.0, gt=0, description="Timeout of one bucket of weights in seconds.")
    hang_timeout_s: Seconds = Field(
        300.0,
        gt=0,
        description="Timeout of the answer of an engine with unfinished requests, in seconds; then it counts as hung.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further engine arguments of the installed vLLM, as {name: value} with the names of its EngineArgs "
        "(quantization, max_logprobs, …).",
    )
    server: ServerSettings | None = Field(None, description="The servers of mode 'server'.")

    def packages(self) -> Iterator[tuple[str, Package]]:
        """Yield the packages that the chosen mode needs."""
        if self.mode != "server":
            yield "", Package("vllm", "rlcore[vllm]")

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield fields that contradict each other, with the reason."""
        if self.mode == "server" and self.server is None:
            yield "server", "mode 'server' needs the section server with the servers' URLs"
        if self.mode != "server" and self.server is not None:
            yield (
                "server",
                f"only mode 'server' uses servers; set mode to 'server', not {self.mode!r}, or remove the section",
            )
        if self.mode != "process" and self.weight_transfer != "rlcore":
            yield "weight_transfer", f"applies to engines of mode 'process'; mode is {self.mode!r}"
        if self.mode != "process" and self.replicas > 1:
            yield "replicas", f"several engines need separate processes: set mode to 'process', not {self.mode!r}"
        if self.enable_lora:
            yield from self._lora_problems()

    def _lora_problems(self) -> Iterator[tuple[str, str]]:
        if self.weight_transfer != "rlcore":
            yield (
                "enable_lora",
                f"adapters need rlcore's transfer: set weight_transfer to rlcore, not {self.weight_transfer}",
            )
        if self.sleep_level == 2 and self.mode != "server":
            yield (
                "enable_lora",
                "sleep_level=2 drops the base weights, which updates of adapters do not restore; set it to 1",
            )
        if self.load_format == "dummy" and self.mode != "server":
            yield (
                "enable_lora",
                "load_format=dummy reads no base weights, and updates of adapters send none; set it to auto",
            )
