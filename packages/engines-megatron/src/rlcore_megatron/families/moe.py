"""Families with mixtures of experts: Qwen3-MoE, Mixtral.

The router computes in fp32. Its load-balancing loss is disabled, because it is not part of the objective. No token is
dropped; tokens travel between expert-parallel processes by all-to-all, because packed rows differ in length.
"""

from __future__ import annotations

from typing import Any

from rlcore_megatron.families.dense import ATTENTION, MLP, NORMS, QUERY_KEY_NORMS
from rlcore_megatron.families.family import Family
from rlcore_megatron.families.weight import Weight


def experts(hf: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """Return the matrices of an expert, whose names begin with ``hf``."""
    megatron = "mlp.experts.local_experts.{expert}"
    return (
        Weight(f"{hf}.{{expert}}.{gate}.weight", f"{megatron}.linear_fc1.weight", "gate", split=0),
        Weight(f"{hf}.{{expert}}.{up}.weight", f"{megatron}.linear_fc1.weight", "up", split=0),
        Weight(f"{hf}.{{expert}}.{down}.weight", f"{megatron}.linear_fc2.weight", split=1),
    )


def router(hf_config: Any, normalised: bool) -> dict[str, Any]:
    """Return the options of a softmax router.

    Args:
        normalised: whether the weights of a token's experts sum to 1. They do if the softmax is over the selected
            experts, and do not if it is over all of them.
    """
    return {
        "num_moe_experts": hf_config.num_experts,
        "moe_router_topk": hf_config.num_experts_per_tok,
        "moe_router_pre_softmax": not normalised,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    }


def _one_expert(config: Any, normalised: bool) -> str | None:
    # the weight of the expert would always be 1, which Megatron's router does not compute
    return "normalised routing to one expert per token" if normalised and config.num_experts_per_tok == 1 else None


def _qwen3_moe(config: Any) -> dict[str, Any]:
    dense = set(config.mlp_only_layers or ())
    sparse = [
        int(i not in dense and (i + 1) % config.decoder_sparse_step == 0) for i in range(config.num_hidden_layers)
    ]
    return {
        **router(config, config.norm_topk_prob),
        "qk_layernorm": True,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": sparse,
    }


QWEN3_MOE = Family(
    "qwen3_moe",
    layer=(
        *ATTENTION,
        *QUERY_KEY_NORMS,
        *experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
        Weight("mlp.gate.weight", "mlp.router.weight"),
        *NORMS,
    ),
    dense_layer=(*ATTENTION, *QUERY_KEY_NORMS, *MLP, *NORMS),
    options=_qwen3_moe,
    refuse=lambda config: "attention_bias" if config.attention_bias else _one_expert(config, config.norm_topk_prob),
)

MIXTRAL = Family(
    "mixtral",
    layer=(
        *ATTENTION,
        Weight("block_sparse_moe.gate.weight", "mlp.router.weight"),
        *experts("block_sparse_moe.experts", "w1", "w3", "w2"),
        *NORMS,
    ),
    options=lambda config: {
        **router(config, normalised=True),
        "moe_ffn_hidden_size": config.intermediate_size,
    },
    refuse=lambda config: _one_expert(config, normalised=True),
)
