"""The layers of the model: megatron-core's own or TransformerEngine's.

Megatron-core's own layers refuse packed sequences, context parallelism and sequence-parallel norms; only those of
TransformerEngine support them. Two replacements remove that limit: attention that calls torch's kernel once per
sequence, and a norm whose weight is marked so that its gradient is summed over tensor-parallel ranks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rlcore_megatron.adapters import AdaptedColumn, AdaptedRow
from rlcore_megatron.packing import gathered_order


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``; under sequence parallelism its weight's gradient is summed over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention within each sequence of a packed row."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale
        self._cp_group = kwargs["pg_collection"].cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> torch.Tensor:
        """Attend ``[T, heads, channels]`` → ``[T, heads · channels]``; keys and values may have fewer heads."""
        boundaries = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [stop - start for start, stop in pairwise(boundaries)]
        cp, rank = self._cp_group.size(), self._cp_group.rank()
        if cp == 1:
            parts = [
                self._attend(q, k, v, None)
                for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths))
            ]
            return torch.cat(parts).flatten(1)
        # Every rank's queries with the keys of all ranks: exact; on CUDA TransformerEngine sends keys around instead.
        order = gathered_order(lengths, cp).to(key.device)
        key, value = (gather_from_sequence_parallel_region(x, group=self._cp_group)[order] for x in (key, value))
        parts = []
        own = query.split([length // cp for length in lengths])
        for q, k, v in zip(own, key.split(lengths), value.split(lengths)):
            chunk = len(q) // 2
            for half, number in zip(q.split(chunk), (rank, 2 * cp - 1 - rank)):
                seen = (number + 1) * chunk
                parts.append(self._attend(half, k[:seen], v[:seen], number * chunk))
        return torch.cat(parts).flatten(1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int | None) -> torch.Tensor:
        """Attend to ``k``, whose first ``before`` tokens precede the first query (None: ``q`` are the same tokens)."""
        mask = None
        if before is not None:
            mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(before)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1)


def block_spec(
    config: TransformerConfig, implementation: str, vp_stage: int | None, adapted: bool = False
) -> TransformerBlockSubmodules:
    """Return the layers of one chunk of this pipeline stage, and the final norm.

    Args:
        adapted: whether linear layers take adapters; those of megatron-core alone can.
    """
    first = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage)
    sparse = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else None
    layers = []
    for number in range(first, first + count):
        every = sparse is None and number % config.moe_layer_freq == 0
        experts = config.num_moe_experts if every or (sparse is not None and sparse[number]) else None
        layers.append(_layer_spec(config, implementation, experts, adapted))
    norm: Any = RMSNorm
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _layer_spec(config: TransformerConfig, implementation: str, experts: int | None, adapted: bool) -> ModuleSpec:
    if implementation == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    spec = get_gpt_layer_local_spec(
        num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if adapted:
        attention.linear_qkv, attention.linear_proj = AdaptedColumn, AdaptedRow
        if experts is None:
            mlp = parts.mlp.submodules
            mlp.linear_fc1, mlp.linear_fc2 = AdaptedColumn, AdaptedRow
    return spec
