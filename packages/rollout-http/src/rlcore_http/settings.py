"""Settings of the HTTP rollout engine. Imports neither torch nor httpx."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from string import Formatter
from typing import Any, Literal

from pydantic import Field

from rlcore.config import FilePath, Seconds
from rlcore_kit.serving.settings import ServerClientSettings, url_problems

COMMAND_FIELDS = ("folder", "url", "version")
"""What ``reload_command`` may name in braces."""


class HTTPSettings(ServerClientSettings):
    """Running servers, their protocol, and how they get new weights."""

    urls: tuple[str, ...] = Field(
        min_length=1,
        description="Base URLs of the servers, e.g. http://127.0.0.1:8080; requests are balanced over them.",
    )
    protocol: Literal["auto", "tgi", "openai"] = Field(
        "auto",
        description="'tgi' is text-generation-inference, 'openai' is /v1/completions with token ids (vLLM, "
        "SGLang); 'auto' asks the server.",
    )
    model: str | None = Field(None, description="Name of the model on the servers; null takes the one that they serve.")
    headers: dict[str, str] = Field(
        default_factory=dict, description="Further headers of every request; a key belongs into api_key_env."
    )
    request_fields: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of every request for a completion (for 'tgi', of its parameters), such as "
        "{stream_interval: 16} for vLLM.",
    )
    logprobs: bool = Field(
        True,
        description="Take the log-probs of sampled tokens from the servers; false leaves them to the trainer, where "
        "the servers' are not those of the sampling temperature.",
    )
    reload: Literal["none", "vllm", "sglang", "command"] = Field(
        "none",
        description="How servers load new weights from weights_dir: by the endpoints of vLLM or SGLang, or by "
        "reload_command. 'none' is for validation and evaluation.",
    )
    weights_dir: FilePath | None = Field(
        None, description="Folder that this process and the servers see under the same path; for reload."
    )
    reload_command: str | None = Field(
        None,
        description="Command that has the server at {url} serve the model folder {folder}, version {version}; for "
        "reload 'command'. It runs without a shell.",
    )
    reload_timeout_s: Seconds = Field(
        900.0, gt=0, description="Timeout of a reload in seconds, until the server is healthy again."
    )

    @property
    def command(self) -> list[str]:
        """The words of ``reload_command``."""
        return shlex.split(self.reload_command or "")

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield fields that contradict each other, with the reason."""
        for problem in url_problems(self.urls, self.allow_remote):
            yield "urls", problem
        if self.reload != "none" and self.weights_dir is None:
            yield "weights_dir", f"reload {self.reload!r} needs a folder that the servers see under the same path"
        if self.protocol == "tgi" and self.reload in ("vllm", "sglang"):
            yield (
                "reload",
                "text-generation-inference loads weights only when it starts: set it to command, with a reload_command "
                "that restarts the server",
            )
        if (self.reload == "command") != (self.reload_command is not None):
            yield "reload_command", "goes with reload 'command', and the other way round: set both or none"
        if self.reload_command is not None:
            yield from self._command_problems(self.reload_command)

    def _command_problems(self, command: str) -> Iterator[tuple[str, str]]:
        try:
            fields = {name for word in shlex.split(command) for _, name, _, _ in Formatter().parse(word) if name}
        except ValueError as error:
            yield "reload_command", f"cannot be read: {error}"
            return
        for name in sorted(fields - set(COMMAND_FIELDS)):
            yield (
                "reload_command",
                f"names {{{name}}}; it may name {', '.join(f'{{{name}}}' for name in COMMAND_FIELDS)}",
            )
        if "folder" not in fields:
            yield "reload_command", "does not name {folder}, so the server would not get the new weights"
