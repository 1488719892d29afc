"""Settings of the vLLM rollout engine. Imports neither torch nor vllm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rlcore.config import Config, Package, Seconds
from rlcore_vllm.server.settings import ServerSettings


class VLLMSettings(Config):
    """Where vLLM runs, and its own arguments under the names that ``vllm serve`` gives them.

    The common ones have a field here; ``args`` takes all others that the installed version knows.
    """

    mode: Literal["in_process", "process", "server"] = Field(
        "in_process",
        description="'in_process' steps vLLM on a thread of this process, 'process' gives it one of its own, 'server' "
        "uses servers that run already (see server).",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=2**16,
        description="Engines of mode 'process', each on GPUs of its own; requests are balanced over them.",
    )
    tensor_parallel_size: int = Field(1, ge=1, le=2**16, description="Processes (GPUs) that share each layer.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Precision of weights and activations; null is bfloat16 on a GPU and float32 on the CPU."
    )
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="Share of the GPU's memory for weights, activations and KV cache; null is vLLM's."
    )
    kv_cache_memory_bytes: int | None = Field(
        None,
        gt=0,
        le=2**50,
        description="Size of the KV cache per worker; null follows gpu_memory_utilization, on the CPU 1 GiB.",
    )
    max_num_seqs: int = Field(256, ge=1, description="Most sequences decoded together; further requests wait.")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Most tokens of one step; null is vLLM's choice."
    )
    enforce_eager: bool | None = Field(
        None,
        description="true runs every operation as it comes; false compiles the model and captures CUDA graphs, which "
        "starts slower and runs faster. null is false on a GPU and true on the CPU.",
    )
    enable_prefix_caching: bool = Field(True, description="Prefill what requests have in common once.")
    load_format: str = Field(
        "auto",
        description="How vLLM reads the model's files; 'dummy' reads none, if weights are sent before the start.",
    )
    enable_lora: bool = Field(
        False,
        description="Take the policy's adapters in place of whole weights, for a policy that trains adapters; those of "
        "model.path stay below them.",
    )
    sleep_level: Literal[1, 2] = Field(
        1,
        description="What sleep does with the weights: 1 keeps them in host memory, 2 drops them until an update.",
    )
    rejoin_timeout_s: Seconds = Field(
        300.0, gt=0, description="Longest wait of a request for one of several replicas when none is left."
    )
    start_timeout_s: Seconds = Field(600.0, gt=0, description="Longest wait for the engine to start.")
    weight_transfer: Literal["rlcore", "nccl", "ipc"] = Field(
        "rlcore",
        description="How weights get from this process to engines of mode 'process': by rlcore's transfer, or by "
        "vLLM's own engines, 'nccl' (GPUs other than the trainer's) or 'ipc' (the trainer's GPU).",
    )
    update_timeout_s: Seconds = Field(300.0, gt=0, description="Longest wait for one bucket of weights to be taken.")
    hang_timeout_s: Seconds = Field(
        300.0, gt=0, description="An engine with unfinished requests that does not answer for so long is given up."
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further engine arguments of the installed vLLM, as {name: value} with the names of its "
        "EngineArgs (quantization, max_logprobs, …).",
    )
    server: ServerSettings | None = Field(None, description="The servers of mode 'server'.")

    def packages(self) -> Iterator[tuple[str, Package]]:
        if self.mode != "server":
            yield "", Package("vllm", "rlcore[vllm]")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.mode == "server" and self.server is None:
            yield "server", "mode 'server' needs the section server with the servers' addresses"
        if self.mode != "server" and self.server is not None:
            yield "server", f"only mode 'server' uses servers; mode is {self.mode!r}"
        if self.mode != "process" and self.weight_transfer != "rlcore":
            yield "weight_transfer", f"is for engines of mode 'process'; mode is {self.mode!r}"
        if self.mode != "process" and self.replicas > 1:
            yield "replicas", f"several engines need processes of their own: set mode to 'process', not {self.mode!r}"
        if self.enable_lora:
            yield from self._lora_problems()

    def _lora_problems(self) -> Iterator[tuple[str, str]]:
        if self.mode == "server":
            yield (
                "enable_lora",
                "servers take whole weights, with the adapters merged into them; set it to false",
            )
        if self.weight_transfer != "rlcore":
            yield "enable_lora", f"adapters go by rlcore's transfer, not weight_transfer={self.weight_transfer}"
        if self.sleep_level == 2:
            yield "enable_lora", "sleep_level=2 drops the weights below the adapters, which nobody sends; set it to 1"
        if self.load_format == "dummy":
            yield "enable_lora", "load_format=dummy reads no weights, and nobody sends those below the adapters"
