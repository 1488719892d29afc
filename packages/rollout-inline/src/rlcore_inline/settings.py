"""Settings of the `inline` rollout engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlcore.config import Config
from rlcore.engines.settings import DType


class InlineSettings(Config):
    """How much runs at once, and in how much memory."""

    max_running: int = Field(256, ge=1, description="Most sequences decoded together; further requests wait.")
    kv_cache_tokens: int | None = Field(
        None,
        ge=64,
        description="Size of the KV cache in tokens (running sequences × the longest of them, in steps of 64); null "
        "makes it as large as max_running sequences could need, up to kv_cache_fraction.",
    )
    kv_cache_fraction: float = Field(
        0.5, gt=0, le=1, description="Most of the free memory the KV cache may take when kv_cache_tokens is null."
    )
    prefill_tokens: int = Field(
        8192, ge=1, description="Most prompt tokens (padding included) in one forward pass; a longer prompt goes alone."
    )
    decoder: Literal["auto", "direct", "generic"] = Field(
        "auto",
        description="'direct' computes Llama-like models straight from their parameters, 'generic' goes through the "
        "model's own forward and serves any architecture that uses transformers' attention interface; 'auto' takes "
        "'direct' where it is known to be right.",
    )
    batch_invariant: bool = Field(
        False,
        description="Make a request's tokens and log-probs the same, bit by bit, whatever else runs: a request that is "
        "made again gives the same completion. For float32 on the CPU; checked before the first use. Costs little with "
        "many short sequences, up to half of the speed with few.",
    )
    device: Literal["cpu", "cuda"] | None = Field(
        None,
        description="Where to compute with weights of its own; null takes CUDA if there is one. In the policy's "
        "process it computes where the policy does.",
    )
    dtype: DType | None = Field(
        None,
        description="Precision of weights of its own; null is bfloat16 on CUDA and float32 on the CPU. In the policy's "
        "process it is the policy's param_dtype.",
    )
