"""Settings of the client of running servers. Imports neither vllm nor httpx."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlcore.config import Config


class ServerSettings(Config):
    """Which servers generate, how they are reached, and how they get weights."""

    urls: tuple[str, ...] = Field(
        min_length=1,
        description="Base URLs of the servers, e.g. http://127.0.0.1:8000; requests are balanced over them.",
    )
    model_name: str | None = Field(
        None, description="Name under which the servers know the model; null takes the one that they serve."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the servers' API key; null sends none."
    )
    allow_remote: bool = Field(
        False, description="Talk to servers that are not on this machine; prompts and completions leave it then."
    )
    max_connections: int = Field(256, ge=1, description="Requests that one server works at; more wait on this side.")
    timeout_s: float = Field(
        600.0,
        gt=0,
        description="Seconds one completion may take, pauses not counted; then its server counts as hung.",
    )
    control_timeout_s: float = Field(60.0, gt=0, description="Seconds a server may take to answer anything else.")
    connect_timeout_s: float = Field(10.0, gt=0, description="Seconds a server may take to accept a connection.")
    retries: int = Field(
        3, ge=0, description="Further attempts where nothing was sent yet, or asking twice changes nothing."
    )
    weights: Literal["transfer", "reload"] = Field(
        "transfer",
        description="'transfer' sends weights into the servers' workers; 'reload' writes them to weights_dir, "
        "where the servers read them.",
    )
    weights_dir: Path | None = Field(
        None, description="Folder that this process and the servers see under one path; needed to reload."
    )
    transport: Literal["auto", "gloo", "nccl", "shm"] = Field("auto", description="By which weights are transferred.")
    weights_host: str = Field(
        "127.0.0.1", description="Address of this machine that the servers' workers reach, for transfers."
    )
    bucket_mb: int = Field(512, gt=0, description="Weights that travel at a time, in MiB; two exist at most.")
    weights_timeout_s: float = Field(300.0, gt=0, description="Seconds any one step of a weight update may take.")
    rejoin_timeout_s: float = Field(
        300.0, gt=0, description="Seconds to wait for a server to come back when none is left."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems: list[str] = []
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                problems.append(f"{url!r} is no URL of a server; write http://host:port")
            elif not self.allow_remote and not _is_loopback(parts.hostname):
                problems.append(f"{url} is not on this machine; set allow_remote to true if you mean it")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            problems.append("urls names a server twice")
        if self.weights == "reload" and self.weights_dir is None:
            problems.append("weights 'reload' needs weights_dir, a folder that the servers see too")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
