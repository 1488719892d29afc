"""Settings of every client of inference servers. Imports no httpx."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from pydantic import Field

from rlcore.config import Config, Seconds
from rlcore.errors import EngineError


class ServerClientSettings(Config):
    """How servers are reached, and how long they may take."""

    api_key_env: str | None = Field(
        None, description="Environment variable that holds the servers' API key; null sends none."
    )
    allow_remote: bool = Field(
        False, description="Talk to servers that are not on this machine; prompts and completions leave it then."
    )
    max_connections: int = Field(256, ge=1, description="Requests that one server works at; more wait on this side.")
    timeout_s: Seconds = Field(
        600.0,
        gt=0,
        description="Seconds one completion may take, pauses not counted; then its server counts as hung.",
    )
    control_timeout_s: Seconds = Field(60.0, gt=0, description="Seconds a server may take to answer anything else.")
    connect_timeout_s: Seconds = Field(10.0, gt=0, description="Seconds a server may take to accept a connection.")
    retries: int = Field(
        3, ge=0, description="Further attempts where nothing was sent yet, or asking twice changes nothing."
    )
    bucket_mb: int = Field(512, gt=0, description="Weights that travel at a time, in MiB; two exist at most.")
    weights_timeout_s: Seconds = Field(300.0, gt=0, description="Seconds any one step of a weight update may take.")
    rejoin_timeout_s: Seconds = Field(
        300.0, gt=0, description="Seconds to wait for a server to come back when none is left."
    )

    def api_key(self) -> str | None:
        """The key that ``api_key_env`` names.

        Raises:
            EngineError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise EngineError(f"the environment variable {self.api_key_env} (api_key_env) holds no API key")
        return key


def url_problems(urls: Sequence[str], allow_remote: bool) -> Iterator[str]:
    """What is wrong with the servers' base URLs."""
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"{url!r} is no URL of a server; write http://host:port"
        elif not allow_remote and not is_loopback(parts.hostname):
            yield f"{url} is not on this machine; set allow_remote to true if you mean it"
    if len({url.rstrip("/") for url in urls}) < len(urls):
        yield "urls names a server twice"


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
