"""Declarations of model families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from rlcore.errors import EngineError
from rlcore_megatron.families.rope import rope_arguments
from rlcore_megatron.families.weight import Heads, Weight

EMBEDDING = Weight("model.embed_tokens.weight", "embedding.word_embeddings.weight", split=0, vocabulary=True)
FINAL_NORM = Weight("model.norm.weight", "decoder.final_layernorm.weight")
LM_HEAD = Weight("lm_head.weight", "output_layer.weight", split=0, vocabulary=True)
SCORE = (Weight("score.weight", "output_layer.weight"), Weight("score.bias", "output_layer.bias"))
"""The scalar head of value and score models."""

_LAYER_IN_HF = "model.layers.{layer}."
_LAYER_IN_MEGATRON = "decoder.layers.{layer}."


@dataclass(frozen=True)
class Named:
    """A `Weight` with its layer and expert, both as numbered in the full model."""

    name: str
    weight: Weight
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Family:
    """A model architecture: a decoder of attention and gated MLPs with RMSNorm and rotary embeddings.

    Attributes:
        name: ``model_type`` of the Hugging Face configuration.
        layer: the tensors of a layer in the order of transformers' model, by their names within the layer.
        dense_layer: tensors of the layers without experts, in a model that has both kinds.
        options: fields of Megatron's ``TransformerConfig`` in addition to those of every family.
        refuse: returns the feature of a configuration that the engine does not compute, or None.
    """

    name: str
    layer: tuple[Weight, ...]
    dense_layer: tuple[Weight, ...] = ()
    options: Callable[[Any], Mapping[str, Any]] = lambda hf_config: {}
    refuse: Callable[[Any], str | None] = lambda hf_config: None

    def check(self, hf_config: Any) -> None:
        """Raise `EngineError` if the engine would not compute what transformers computes."""
        problem = self.refuse(hf_config)
        kinds = set(getattr(hf_config, "layer_types", None) or ("sliding_attention",))
        if getattr(hf_config, "sliding_window", None) and kinds != {"full_attention"}:
            problem = "sliding-window attention"
        if hf_config.hidden_act != "silu":
            problem = f"the activation {hf_config.hidden_act}"
        if problem:
            raise EngineError(
                f"the megatron engine does not compute {problem} of this {self.name} model; use engine=fsdp"
            )
        rope_arguments(hf_config)

    def transformer_config(self, hf_config: Any) -> dict[str, Any]:
        """Return the fields of Megatron's ``TransformerConfig`` that the model determines."""
        return {
            "num_layers": hf_config.num_hidden_layers,
            "hidden_size": hf_config.hidden_size,
            "ffn_hidden_size": hf_config.intermediate_size,
            "num_attention_heads": hf_config.num_attention_heads,
            "num_query_groups": hf_config.num_key_value_heads,
            "kv_channels": head_dim(hf_config),
            "normalization": "RMSNorm",
            "layernorm_epsilon": hf_config.rms_norm_eps,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **self.options(hf_config),
        }

    def model_arguments(self, hf_config: Any) -> dict[str, Any]:
        """Return the arguments of Megatron's ``GPTModel`` that the model determines; ``vocab_size`` is not padded."""
        return {
            "vocab_size": hf_config.vocab_size,
            "max_sequence_length": hf_config.max_position_embeddings,
            "share_embeddings_and_output_weights": bool(hf_config.tie_word_embeddings),
            "position_embedding_type": "rope",
            **rope_arguments(hf_config),
        }

    def heads(self, hf_config: Any) -> Heads:
        """Return the sizes of attention heads."""
        return Heads(hf_config.num_attention_heads // hf_config.num_key_value_heads, head_dim(hf_config))

    def body(self, hf_config: Any) -> Iterator[Named]:
        """Yield every tensor but the head's, in the order of transformers' model.

        Experts are one tensor in transformers' memory and many in its files. Their order is that of the files: the
        gates of a layer's experts, then all their up projections, then all down projections.
        """
        yield Named(EMBEDDING.hf, EMBEDDING)
        experts = self.experts(hf_config)
        for layer in range(hf_config.num_hidden_layers):
            weights = self.layer if self.has_experts(hf_config, layer) or not self.dense_layer else self.dense_layer
            for per_expert, together in groupby(weights, lambda weight: weight.per_expert):
                for weight in map(_in_layer, together):
                    for expert in range(experts) if per_expert else (None,):
                        yield Named(weight.hf.format(layer=layer, expert=expert), weight, layer, expert)
        yield Named(FINAL_NORM.hf, FINAL_NORM)

    def experts(self, hf_config: Any) -> int:
        """Return the number of experts of a layer that has them; 0 in a dense model."""
        return self.options(hf_config).get("num_moe_experts", 0)  # type: ignore[no-any-return]

    def has_experts(self, hf_config: Any, layer: int) -> bool:
        """Return whether a layer, numbered from 0, is a mixture of experts."""
        sparse = self.options(hf_config).get("moe_layer_freq")
        return self.experts(hf_config) > 0 and (sparse is None or bool(sparse[layer]))


def head_dim(hf_config: Any) -> int:
    """Return the number of elements of an attention head."""
    stated = getattr(hf_config, "head_dim", None)
    return int(stated or hf_config.hidden_size // hf_config.num_attention_heads)


def _in_layer(weight: Weight) -> Weight:
    return Weight(
        _LAYER_IN_HF + weight.hf, _LAYER_IN_MEGATRON + weight.megatron, weight.part, weight.split, weight.vocabulary
    )
