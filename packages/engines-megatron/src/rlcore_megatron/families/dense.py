"""Families whose layers are dense: Llama 3, Mistral, Qwen2 (and 2.5), Qwen3."""

from __future__ import annotations

from rlcore_megatron.families.family import Family
from rlcore_megatron.families.weight import Weight

_QKV = "self_attention.linear_qkv"

OUTPUT = Weight("self_attn.o_proj.weight", "self_attention.linear_proj.weight", split=1)
ATTENTION = (
    Weight("self_attn.q_proj.weight", f"{_QKV}.weight", "query", split=0),
    Weight("self_attn.k_proj.weight", f"{_QKV}.weight", "key", split=0),
    Weight("self_attn.v_proj.weight", f"{_QKV}.weight", "value", split=0),
    OUTPUT,
)
BIASED_ATTENTION = (
    Weight("self_attn.q_proj.weight", f"{_QKV}.weight", "query", split=0),
    Weight("self_attn.q_proj.bias", f"{_QKV}.bias", "query", split=0),
    Weight("self_attn.k_proj.weight", f"{_QKV}.weight", "key", split=0),
    Weight("self_attn.k_proj.bias", f"{_QKV}.bias", "key", split=0),
    Weight("self_attn.v_proj.weight", f"{_QKV}.weight", "value", split=0),
    Weight("self_attn.v_proj.bias", f"{_QKV}.bias", "value", split=0),
    OUTPUT,
)
QUERY_KEY_NORMS = (
    Weight("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
    Weight("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
)
MLP = (
    Weight("mlp.gate_proj.weight", "mlp.linear_fc1.weight", "gate", split=0),
    Weight("mlp.up_proj.weight", "mlp.linear_fc1.weight", "up", split=0),
    Weight("mlp.down_proj.weight", "mlp.linear_fc2.weight", split=1),
)
NORMS = (
    Weight("input_layernorm.weight", "input_layernorm.weight"),
    Weight("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
)

QWEN2 = Family(
    "qwen2",
    layer=(*BIASED_ATTENTION, *MLP, *NORMS),
    options=lambda config: {"add_qkv_bias": True},
)

QWEN3 = Family(
    "qwen3",
    layer=(*ATTENTION, *QUERY_KEY_NORMS, *MLP, *NORMS),
    options=lambda config: {"qk_layernorm": True},
    refuse=lambda config: "attention_bias" if config.attention_bias else None,
)

LLAMA = Family(
    "llama",
    layer=(*ATTENTION, *MLP, *NORMS),
    refuse=lambda config: "attention_bias or mlp_bias" if config.attention_bias or config.mlp_bias else None,
)

MISTRAL = Family("mistral", layer=(*ATTENTION, *MLP, *NORMS))
