"""Settings of the SGLang rollout engine. Imports neither torch nor sglang nor httpx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rlcore.config import FilePath, Package, Seconds
from rlcore_kit.serving.settings import ServerClientSettings, url_problems


class SGLangSettings(ServerClientSettings):
    """Servers that run already (``urls``), or servers that are started here, and how they are used.

    Servers that are started take the fields that SGLang's server has, under its names; ``args`` takes all others that
    the installed version knows.
    """

    urls: tuple[str, ...] = Field(
        (),
        description="Base URLs of running servers, e.g. http://127.0.0.1:30000; none starts servers on this machine.",
    )
    router: str | None = Field(
        None,
        description="Base URL of SGLang's router before the servers of urls: it spreads the requests, weights go to "
        "the servers themselves.",
    )
    replicas: int = Field(1, ge=1, le=2**16, description="Servers to start.")

    tp_size: int = Field(1, ge=1, le=2**16, description="Processes (GPUs) of a server that share each layer.")
    device: Literal["cuda", "cpu"] | None = Field(None, description="Where servers compute; null is SGLang's choice.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Precision of weights and activations; null is bfloat16, on the CPU float32."
    )
    mem_fraction_static: float | None = Field(
        None, gt=0, lt=1, description="Share of the memory for weights and KV cache; null is SGLang's choice."
    )
    max_total_tokens: int | None = Field(
        None, ge=1, description="Tokens of the KV cache; null follows mem_fraction_static."
    )
    max_running_requests: int = Field(256, ge=1, description="Most sequences decoded together; further ones wait.")
    attention_backend: str | None = Field(None, description="SGLang's attention kernels; null is its choice.")
    sampling_backend: str = Field(
        "rlcore",
        description="'rlcore' draws every request from its own seed; SGLang's own (flashinfer, pytorch) ignore seeds.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of the installed SGLang, as {name: value} with the names of its ServerArgs "
        "(quantization, chunked_prefill_size, …).",
    )
    env: dict[str, str] = Field(default_factory=dict, description="Environment variables of servers started here.")
    log_dir: FilePath | None = Field(
        None, description="Folder of the servers' logs; null is a new one among the temporary files."
    )
    start_timeout_s: Seconds = Field(900.0, gt=0, description="Longest wait for a server to start.")
    keep_weights: bool = Field(
        True,
        description="Keep a copy of the current weights in this process's memory, with which a server that died is "
        "started anew; without it waits for the next update.",
    )

    weights: Literal["tensor", "distributed", "disk"] = Field(
        "tensor",
        description="'tensor' posts weights as flattened buckets, 'distributed' broadcasts them in a process group, "
        "'disk' writes them to weights_dir, where the servers read them.",
    )
    weights_backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="Of the process group for 'distributed'; 'auto' is NCCL for weights on GPUs."
    )
    weights_host: str = Field("127.0.0.1", description="Address of this machine that servers reach, for 'distributed'.")
    weights_dir: FilePath | None = Field(
        None, description="Folder that this process and the servers see under one path, for 'disk'."
    )
    pause_mode: Literal["retract", "in_place", "abort"] = Field(
        "retract",
        description="What becomes of unfinished requests in a pause, as for new weights: 'retract' computes their KV "
        "cache anew, 'in_place' goes on with that of the old weights, 'abort' ends them on the server and starts them "
        "again with what they have.",
    )
    sleep_level: Literal[1, 2] = Field(
        1, description="What sleep does with the weights: 1 keeps them in host memory, 2 drops them until an update."
    )
    health_interval_s: Seconds = Field(
        60.0, gt=0, description="Seconds between looks at a server that has unfinished requests and says nothing."
    )

    @property
    def starts_servers(self) -> bool:
        return not self.urls

    def packages(self) -> Iterator[tuple[str, Package]]:
        if self.starts_servers:
            yield "", Package("sglang", "rlcore[sglang]")

    def problems(self) -> Iterator[tuple[str, str]]:
        routed = () if self.router is None else (self.router,)
        for problem in url_problems((*self.urls, *routed), self.allow_remote):
            yield "urls", problem
        if self.router is not None and not self.urls:
            yield "router", "the servers behind the router get their weights directly; name them in urls"
        if self.urls and self.replicas > 1:
            yield "replicas", "servers are started only where urls names none"
        if self.weights == "disk" and self.weights_dir is None:
            yield "weights_dir", "weights 'disk' needs a folder that the servers see too"
