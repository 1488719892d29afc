"""Settings of the SGLang rollout engine. Imports neither torch nor sglang nor httpx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rlcore.config import FilePath, Package, Seconds
from rlcore_kit.serving.settings import ServerClientSettings, url_problems


class SGLangSettings(ServerClientSettings):
    """Running servers (``urls``), or servers that are started on this machine, and how they are used.

    Arguments of servers that are started are fields under SGLang's names; ``args`` takes all others that the installed
    version knows.
    """

    urls: tuple[str, ...] = Field(
        (),
        description="Base URLs of running servers, e.g. http://127.0.0.1:30000; empty starts servers on this machine.",
    )
    router: str | None = Field(
        None,
        description="Base URL of an SGLang router in front of the servers in urls: requests go to the router, weights "
        "directly to the servers.",
    )
    replicas: int = Field(1, ge=1, le=2**16, description="Number of servers to start.")

    tp_size: int = Field(1, ge=1, le=2**16, description="Number of processes (GPUs) of a server that share each layer.")
    device: Literal["cuda", "cpu"] | None = Field(None, description="Device of the servers; null is SGLang's default.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Precision of weights and activations; null is bfloat16 on a GPU and float32 on the CPU."
    )
    mem_fraction_static: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the memory for weights and KV cache; null is SGLang's default."
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="Size of the KV cache in tokens; null follows mem_fraction_static."
    )
    max_running_requests: int = Field(
        256, ge=1, description="Maximum number of concurrent sequences; further requests wait."
    )
    attention_backend: str | None = Field(None, description="SGLang's attention kernels; null is its default.")
    enable_lora: bool = Field(
        False,
        description="Update the policy's LoRA adapters instead of full weights, for a policy that trains adapters; the "
        "base weights are those of model.path. Needs pause_mode 'abort'.",
    )
    sampling_backend: str = Field(
        "rlcore",
        description="'rlcore' samples every request from its seed; flashinfer and pytorch ignore seeds.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of the installed SGLang, as {name: value} with the names of its ServerArgs "
        "(quantization, chunked_prefill_size, …).",
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment variables of servers that are started on this machine."
    )
    log_dir: FilePath | None = Field(None, description="Folder of the servers' logs; null creates a temporary folder.")
    start_timeout_s: Seconds = Field(900.0, gt=0, description="Timeout of a server's start in seconds.")
    keep_weights: bool = Field(
        True,
        description="Keep a copy of the current weights in this process's memory for a server that is restarted; "
        "without a copy, the server waits for the next update.",
    )

    weights: Literal["tensor", "distributed", "disk"] = Field(
        "tensor",
        description="'tensor' posts weights as flattened buckets by HTTP, 'distributed' broadcasts them in a process "
        "group, 'disk' writes them to weights_dir, where the servers read them.",
    )
    weights_backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto",
        description="Backend of the process group for 'distributed'; 'auto' is NCCL for weights on GPUs, else gloo.",
    )
    weights_host: str = Field("127.0.0.1", description="Address of this machine that servers reach for 'distributed'.")
    weights_dir: FilePath | None = Field(
        None, description="Folder that this process and the servers see under the same path, for 'disk'."
    )
    pause_mode: Literal["retract", "in_place", "abort"] = Field(
        "retract",
        description="What happens to unfinished requests in a pause, such as a weight update: 'retract' computes their "
        "KV cache again, 'in_place' keeps that of the old weights, 'abort' ends them on the server and sends them "
        "again with the tokens that they have.",
    )
    sleep_level: Literal[1, 2] = Field(
        1, description="What sleep does with the weights: 1 moves them to host memory, 2 drops them until an update."
    )
    health_interval_s: Seconds = Field(
        60.0,
        gt=0,
        description="Seconds between health checks of a server that has unfinished requests and sends nothing.",
    )

    @property
    def starts_servers(self) -> bool:
        """Whether servers are started on this machine."""
        return not self.urls

    def packages(self) -> Iterator[tuple[str, Package]]:
        """Yield the packages that servers on this machine need."""
        if self.starts_servers:
            yield "", Package("sglang", "rlcore[sglang]")

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield fields that contradict each other, with the reason."""
        routed = () if self.router is None else (self.router,)
        for problem in url_problems((*self.urls, *routed), self.allow_remote):
            yield "urls", problem
        if self.router is not None and not self.urls:
            yield "router", "weights go directly to the servers behind the router; name them in urls"
        if self.urls and self.replicas > 1:
            yield "replicas", "servers are started only if urls is empty; remove urls or replicas"
        if self.enable_lora:
            yield from self._lora_problems()
        if self.weights == "disk" and self.weights_dir is None:
            yield "weights_dir", "weights 'disk' needs a folder that the servers see under the same path"

    def _lora_problems(self) -> Iterator[tuple[str, str]]:
        if self.pause_mode != "abort":
            yield (
                "enable_lora",
                "unfinished requests keep their adapters on SGLang: set pause_mode to abort, which continues them with "
                f"the new ones, not {self.pause_mode}",
            )
        if self.weights != "tensor":
            yield "enable_lora", f"adapters are posted: set weights to tensor, not {self.weights}"
        if self.sleep_level == 2:
            yield (
                "enable_lora",
                "sleep_level=2 drops the base weights, which updates of adapters do not restore; set it to 1",
            )
