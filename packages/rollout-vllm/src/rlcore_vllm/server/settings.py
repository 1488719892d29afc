"""Settings of the client of running servers. Imports neither vllm nor httpx."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rlcore.config import FilePath
from rlcore_kit.serving.settings import ServerClientSettings, url_problems


class ServerSettings(ServerClientSettings):
    """Running ``vllm serve`` servers, and how they get weights."""

    urls: tuple[str, ...] = Field(
        min_length=1,
        description="Base URLs of the servers, e.g. http://127.0.0.1:8000; requests are balanced over them.",
    )
    model_name: str | None = Field(
        None, description="Name of the model on the servers; null takes the one that they serve."
    )
    weights: Literal["transfer", "reload"] = Field(
        "transfer",
        description="'transfer' sends weights to the servers' workers; 'reload' writes them to weights_dir, where the "
        "servers read them.",
    )
    weights_dir: FilePath | None = Field(
        None, description="Folder that this process and the servers see under the same path; for 'reload'."
    )
    transport: Literal["auto", "gloo", "nccl", "shm"] = Field("auto", description="Transport of weights.")
    delta: bool = Field(
        False,
        description="Transfer only the elements that changed: fewer bytes, but a copy of the weights in host memory "
        "here and in every worker.",
    )
    weights_host: str = Field(
        "127.0.0.1", description="Address of this machine that the servers' workers reach for transfers."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(url_problems(self.urls, self.allow_remote))
        if self.weights == "reload" and self.weights_dir is None:
            problems.append("weights 'reload' needs weights_dir, a folder that the servers see under the same path")
        if self.delta and (self.weights == "reload" or self.transport == "nccl"):
            problems.append(
                "delta needs weights 'transfer' by shm or gloo: it compares and applies weights on the host"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
