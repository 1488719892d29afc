"""Settings of the Megatron training engine. Imports neither torch nor megatron."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field

from rlcore.config import Config, Package
from rlcore.engines import LoRASettings
from rlcore_megatron import megatron_fields

DType = Literal["float32", "bfloat16"]
CheckpointFormat = Literal["safetensors", "torch_dist"]

# Fields of Megatron's dataclasses that are not passed through, and what determines them instead.
_DETERMINED: dict[str, dict[str, str]] = {
    "transformer": {
        "tensor_model_parallel_size": "tensor_parallel",
        "pipeline_model_parallel_size": "pipeline_parallel",
        "virtual_pipeline_model_parallel_size": "virtual_pipeline",
        "context_parallel_size": "context_parallel",
        "expert_model_parallel_size": "expert_parallel",
        "expert_tensor_parallel_size": "expert_tensor_parallel",
        "sequence_parallel": "sequence_parallel",
        "params_dtype": "dtype",
        "pipeline_dtype": "dtype",
        "bf16": "dtype",
        "fp16": "dtype",
        "recompute_granularity": "recompute",
        "use_cpu_initialization": "device",
        "num_layers": "the model's config.json",
        "hidden_size": "the model's config.json",
        "num_attention_heads": "the model's config.json",
        "num_query_groups": "the model's config.json",
        "kv_channels": "the model's config.json",
        "ffn_hidden_size": "the model's config.json",
        "num_moe_experts": "the model's config.json",
        "calculate_per_token_loss": "the objective, which sums over tokens itself",
        "variable_seq_lengths": "the engine: packed rows differ in length",
        "moe_aux_loss_coeff": "the objective: an auxiliary loss of the router is not part of it",
        "finalize_model_grads_func": "the engine",
        "grad_scale_func": "the engine",
        "no_sync_func": "the engine",
        "grad_sync_func": "the engine",
        "param_sync_func": "the engine",
        "hidden_dropout": "the engine: the policy that is trained must be the one that generated",
        "attention_dropout": "the engine: the policy that is trained must be the one that generated",
    },
    "optimizer": {
        "optimizer": "the engine (AdamW)",
        "lr": "optim.lr",
        "weight_decay": "optim.weight_decay",
        "adam_beta1": "optim.betas",
        "adam_beta2": "optim.betas",
        "adam_eps": "optim.eps",
        "clip_grad": "optim.clip_grad",
        "bf16": "dtype",
        "fp16": "dtype",
        "params_dtype": "dtype",
        "use_distributed_optimizer": "distributed_optimizer",
    },
    "ddp": {
        "use_distributed_optimizer": "distributed_optimizer",
        "average_in_collective": "the objective, whose gradients are summed",
    },
}


class MegatronSettings(Config):
    """Parallel layout and precision of the Megatron engine."""

    device: Literal["cpu", "cuda"] | None = Field(
        None, description="Device to compute on; null is CUDA if there is one. The CPU is for tests and debugging."
    )
    tensor_parallel: int = Field(
        1, ge=1, le=2**16, description="Number of processes that share every layer's matrices."
    )
    pipeline_parallel: int = Field(1, ge=1, le=2**16, description="Number of stages of consecutive layers.")
    virtual_pipeline: int = Field(
        1,
        ge=1,
        le=2**16,
        description="Chunks of layers per stage (interleaved 1F1B): smaller pipeline bubbles, more communication.",
    )
    context_parallel: int = Field(
        1, ge=1, le=2**16, description="Number of processes that share every sequence's tokens."
    )
    expert_parallel: int = Field(
        1, ge=1, le=2**16, description="Number of processes that share the experts of a mixture-of-experts layer."
    )
    expert_tensor_parallel: int | None = Field(
        None, ge=1, description="Number of processes that share every expert's matrices; null is tensor_parallel."
    )
    sequence_parallel: bool = Field(
        False,
        description="Sequence parallelism: divide norms and residuals between tensor-parallel matrices by tokens.",
    )
    dtype: DType | None = Field(
        None,
        description="Precision of forward and backward; null is bfloat16 on CUDA and float32 on the CPU. The optimizer "
        "updates float32 weights in any case.",
    )
    implementation: Literal["local", "transformer_engine"] | None = Field(
        None,
        description="Layers of megatron-core (local) or of TransformerEngine; null is TransformerEngine on CUDA, and "
        "megatron-core's with adapters.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activations to recompute in backward: none, those of attention, or those of full layers."
    )
    distributed_optimizer: bool = Field(
        True, description="Divide fp32 weights and optimizer states over data-parallel processes (ZeRO-1)."
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer states in host memory between optimizer steps.")
    lora: LoRASettings | None = Field(
        None,
        description="Train low-rank adapters (and a scalar head) and freeze all weights; null trains all weights.",
    )
    logits_chunk: int | None = Field(
        None, ge=1, description="Number of tokens whose logits exist at a time; null bounds their memory instead."
    )
    checkpoint_format: CheckpointFormat = Field(
        "safetensors",
        description="Format of checkpoints: safetensors, or torch_dist for Megatron's tools. The engine reads both.",
    )
    transformer: dict[str, Any] = Field(
        default_factory=dict, description="Any other field of megatron-core's TransformerConfig."
    )
    optimizer: dict[str, Any] = Field(
        default_factory=dict, description="Any other field of megatron-core's OptimizerConfig."
    )
    ddp: dict[str, Any] = Field(
        default_factory=dict, description="Any other field of megatron-core's DistributedDataParallelConfig."
    )

    @property
    def model_parallel(self) -> int:
        """Number of processes that hold one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    def packages(self) -> Iterator[tuple[str, Package]]:
        yield "", Package("megatron.core", "rlcore[megatron]")
        if self.lora is not None:
            yield "lora", Package("peft", "rlcore[lora]")
        if self.implementation == "transformer_engine":
            yield "implementation", Package("transformer_engine", "transformer-engine[pytorch]")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.sequence_parallel and self.tensor_parallel == 1:
            yield "sequence_parallel", "divides work among tensor-parallel processes, but tensor_parallel is 1"
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            yield "virtual_pipeline", "divides pipeline stages into chunks, but pipeline_parallel is 1"
        if self.expert_parallel > 1 and self.tensor_parallel > 1 and not self.sequence_parallel:
            yield "sequence_parallel", "must be true where expert_parallel and tensor_parallel are both above 1"
        if self.lora is not None and self.lora.dropout:
            yield "lora.dropout", "the megatron engine's adapters have none; set it to 0"
        if self.lora is not None and self.implementation == "transformer_engine":
            yield "lora", "adapters need megatron-core's own layers: set implementation to local, or to null"
        for section in ("transformer", "optimizer", "ddp"):
            for name in getattr(self, section):
                if problem := _passthrough_problem(section, name):
                    yield f"{section}.{name}", problem


def _passthrough_problem(section: str, name: str) -> str | None:
    if name in _DETERMINED[section]:
        return f"is determined by {_DETERMINED[section][name]} and cannot be set here"
    known = megatron_fields.names(section)
    if known is None or name in known:  # without megatron-core there is nothing to compare with; building needs it
        return None
    close = get_close_matches(name, known - _DETERMINED[section].keys(), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"megatron-core's {megatron_fields.CLASSES[section]} has no such field{hint}"
