"""Bodies of requests of the token protocol. Imports no server."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlcore.engines.rollout import SamplingParams

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
}
"""Parameters that rollout engines do not have, and the values at which they change nothing."""
WITHOUT_EFFECT = frozenset(
    # of the text, which answers do not have; the last is of expert routes, which are not returned
    {"detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"}
    | {"output_kind", "flat_logprobs", "routed_experts_prompt_start"}
)

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TokenSampling(BaseModel):
    """``sampling_params``, with vLLM's defaults; ``max_tokens`` null: as many as the model's length allows."""

    model_config = ConfigDict(extra="allow")

    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    stop: tuple[str, ...] | str | None = None
    stop_token_ids: tuple[TokenId, ...] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in WITHOUT_EFFECT and value is not None and value not in NEUTRAL.get(name, ()):
                raise ValueError(f"rlcore's rollout engines have no sampling parameter {name}; remove it")
        return self

    def for_engine(self) -> SamplingParams:
        """Return the parameters of an engine's request."""
        return SamplingParams(
            max_tokens=self.max_tokens or 2**31 - 1,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            logprobs=self.logprobs is not None,
        )


class TokenRequest(BaseModel):
    """Body of ``/inference/v1/generate``."""

    token_ids: list[TokenId] = Field(min_length=1)
    sampling_params: TokenSampling = TokenSampling()
    request_id: str | None = None
    model: str | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    features: Any = None
    content_parts: Any = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("stream", "features", "content_parts"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: answers are complete, and prompts are token ids")
        return self
