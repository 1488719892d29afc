"""Settings of the FSDP training engine. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from rlcore.config import Config, Package
from rlcore.engines import LoRASettings
from rlcore.engines.settings import DType


class FSDPSettings(Config):
    """Sharding, precision and memory of the FSDP engine."""

    device: Literal["cpu", "cuda"] | None = Field(
        None, description="Device to compute on; null is CUDA if there is one."
    )
    param_dtype: DType | None = Field(
        None, description="Precision of forward and backward; null is bfloat16 on CUDA and float32 on the CPU."
    )
    master_dtype: DType | None = Field(
        None,
        description="Precision of the weights that the optimizer updates; null is float32, or param_dtype without one.",
    )
    reduce_dtype: DType = Field("float32", description="Precision in which gradients are summed over ranks.")
    replicate: int = Field(
        1,
        ge=1,
        le=2**16,
        description="Hybrid sharding: number of replicas, each sharded over world size / replicate ranks.",
    )
    reshard_after_forward: bool = Field(
        True,
        description="Free a layer's gathered parameters after its forward pass and gather them again for backward.",
    )
    reduce_every_micro_batch: bool = Field(
        False,
        description="Reduce gradients after every micro-batch instead of once per step: more communication, but only "
        "sharded gradients are kept between micro-batches.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute each layer's activations in the backward pass instead of keeping them."
    )
    offload_params: bool = Field(
        False,
        description="Keep parameters, gradients and optimizer states in host memory; each layer is copied to the GPU "
        "for its computation.",
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer states in host memory between optimizer steps.")
    share_prefixes: bool = Field(
        True,
        description="Compute the tokens with which several sequences of a micro-batch begin (a prompt with several "
        "completions, a branching conversation) once. Losses and gradients do not depend on it, up to rounding.",
    )
    lora: LoRASettings | None = Field(
        None,
        description="Train low-rank adapters (and a new scalar head) and freeze all weights; null trains all weights.",
    )
    logits_chunk: int | None = Field(
        None, ge=1, description="Number of tokens whose logits exist at a time; null bounds their memory instead."
    )

    def packages(self) -> Iterator[tuple[str, Package]]:
        if self.lora is not None:
            yield "lora", Package("peft", "rlcore[lora]")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.master_dtype == "bfloat16" and self.param_dtype == "float32":
            raise ValueError(
                "master_dtype bfloat16 is narrower than param_dtype float32: the optimizer would round the weights of "
                "the forward pass; set master_dtype to float32 or param_dtype to bfloat16"
            )
        if self.offload_params and self.offload_optimizer:
            raise ValueError(
                "offload_params already offloads optimizer states; set only one of offload_params and offload_optimizer"
            )
        return self
