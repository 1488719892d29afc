"""Settings that all clients of inference servers share. Imports no httpx."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from pydantic import Field

from rlcore.config import Config, Seconds
from rlcore.errors import EngineError


class ServerAccessSettings(Config):
    """Connection and timeouts of a client of inference servers."""

    api_key_env: str | None = Field(
        None, description="Environment variable that holds the servers' API key; null sends none."
    )
    allow_remote: bool = Field(
        False,
        description="Allow servers on other machines; prompts, completions and weights then leave this machine.",
    )
    max_connections: int = Field(
        256, ge=1, description="Maximum number of concurrent requests per server; further ones wait."
    )
    timeout_s: Seconds = Field(
        600.0,
        gt=0,
        description="Timeout of one completion or score in seconds, pauses excluded; its server then counts as hung.",
    )
    control_timeout_s: Seconds = Field(60.0, gt=0, description="Timeout of every other request in seconds.")
    connect_timeout_s: Seconds = Field(10.0, gt=0, description="Timeout of a connection attempt in seconds.")
    retries: int = Field(
        3, ge=0, description="Further attempts of a request that did not reach the server, or that only reads."
    )
    rejoin_timeout_s: Seconds = Field(
        300.0, gt=0, description="Timeout of requests while no server is available, in seconds."
    )

    def api_key(self) -> str | None:
        """Return the API key in the environment variable ``api_key_env``; None if no variable is set.

        Raises:
            EngineError: the variable does not exist or is empty.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env)
        if not key:
            raise EngineError(f"the environment variable {self.api_key_env} (api_key_env) holds no API key; export it")
        return key


class ServerClientSettings(ServerAccessSettings):
    """Connection and timeouts of a client that gives servers weights, too."""

    bucket_mb: int = Field(512, gt=0, description="Size of a weight bucket in MiB; at most two exist at a time.")
    weights_timeout_s: Seconds = Field(300.0, gt=0, description="Timeout of each step of a weight update in seconds.")


def url_problems(urls: Sequence[str], allow_remote: bool) -> Iterator[str]:
    """Yield what is wrong with the servers' base URLs."""
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"{url!r} is not the URL of a server; write http://host:port"
        elif not allow_remote and not is_loopback(parts.hostname):
            yield f"{url} is not on this machine; set allow_remote to true to allow that"
    if len({url.rstrip("/") for url in urls}) < len(urls):
        yield "urls names a server twice"


def is_loopback(host: str) -> bool:
    """Return whether ``host``, a name or an address, is this machine's loopback interface."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
