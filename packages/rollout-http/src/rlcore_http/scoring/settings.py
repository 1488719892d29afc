"""Settings of the HTTP scoring engine. Imports neither torch nor httpx."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from rlcore_kit.serving.settings import ServerAccessSettings, url_problems


class HTTPScoringSettings(ServerAccessSettings):
    """Running servers that score given tokens."""

    urls: tuple[str, ...] = Field(
        min_length=1,
        description="Base URLs of the servers, e.g. http://127.0.0.1:8000; all serve the same model, and requests are "
        "balanced over them.",
    )
    protocol: Literal["auto", "vllm", "sglang"] = Field(
        "auto",
        description="'vllm' is /v1/completions with prompt_logprobs, 'sglang' is /generate with return_logprob; 'auto' "
        "asks the server.",
    )
    model: str | None = Field(
        None, description="Name of the model on vLLM servers; null takes the one that they serve."
    )
    headers: dict[str, str] = Field(
        default_factory=dict, description="Further headers of every request; a key belongs into api_key_env."
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield fields that contradict each other, with the reason."""
        for problem in url_problems(self.urls, self.allow_remote):
            yield "urls", problem
        if self.protocol == "sglang" and self.model is not None:
            yield "model", "an SGLang server has one model; set it to null"
