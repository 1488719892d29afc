"""Settings of the `inline` rollout engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlcore.config import Config
from rlcore.engines.settings import DType


class InlineSettings(Config):
    """Settings of `rlcore_inline.engine.InlineRollout`."""

    max_running: int = Field(
        256, ge=1, description="Maximum number of sequences that are decoded together; further requests wait."
    )
    kv_cache_tokens: int | None = Field(
        None,
        ge=64,
        description="Size of the KV cache in tokens (number of running sequences × length of the longest, rounded up "
        "to a multiple of 64); null allocates what max_running sequences need, up to kv_cache_fraction.",
    )
    kv_cache_fraction: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Maximum share of the free memory for the KV cache, where kv_cache_tokens is null.",
    )
    prefill_tokens: int = Field(
        8192,
        ge=1,
        description="Maximum number of prompt tokens, padding included, in one forward pass; a longer prompt has a "
        "forward pass to itself.",
    )
    decoder: Literal["auto", "direct", "generic"] = Field(
        "auto",
        description="How tokens are computed: 'direct' computes Llama-like models from their parameters; 'generic' "
        "calls the model's forward, for any architecture with transformers' attention interface; 'auto' takes 'direct' "
        "for the architectures that it supports.",
    )
    batch_invariant: bool = Field(
        False,
        description="Make a request's tokens and log-probs bit-identical whatever other requests run, so that a "
        "repeated request gives the same completion. For float32 on the CPU; checked before the first use. Costs "
        "little with many short sequences, up to half of the speed with few.",
    )
    device: Literal["cpu", "cuda"] | None = Field(
        None,
        description="Device of a rollout in another process than the policy; null takes CUDA if available. In the "
        "policy's process the rollout uses the policy's device.",
    )
    dtype: DType | None = Field(
        None,
        description="Precision of the weights of a rollout in another process than the policy; null is bfloat16 on "
        "CUDA and float32 on the CPU. In the policy's process it is the policy's param_dtype.",
    )
