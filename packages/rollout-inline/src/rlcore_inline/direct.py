"""The direct decoder: computes Llama-like models from their parameters.

The forward passes of Llama, Mistral, Qwen2 and Qwen3 are the same: pre-norm blocks of grouped-query attention with
rotary positions (biases, per-head norms and windows depend on the layer) and a gated MLP. This implementation has no
modules, hooks and masks, which a decoding step does not need; that makes small models fast. It uses the model's
parameters: nothing is fused or copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, rms_norm

from rlcore_inline.attention import AttentionKind, DecodeStep, PrefillStep
from rlcore_inline.kv_cache import LayerShape
from rlcore_kit.model_folder.length import rope_boundary

# Causal LM classes of transformers with the forward pass below. The generic decoder computes all others, including
# subclasses of these.
KNOWN = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


@dataclass(frozen=True)
class _Block:
    """One layer's parameters."""

    input_norm: Tensor
    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    output: tuple[Tensor, Tensor | None]
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention: AttentionKind
    mlp_norm: Tensor
    gate: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


def unsupported_reason(model: nn.Module) -> str | None:
    """Return the reason why the direct decoder does not support ``model``; None if it does."""
    kind = type(model)
    if kind.__name__ not in KNOWN or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not one of {', '.join(sorted(KNOWN))} of transformers"
    config: Any = model.config
    if (boundary := rope_boundary(config)) is not None:
        return f"its rotary embedding ({boundary[0]}) depends on the input's length"
    replaced = [
        name
        for name, module in model.named_modules()
        if name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear
    ]
    if replaced:
        return f"{replaced[0]} is a {type(model.get_submodule(replaced[0])).__name__}, not a plain linear layer"
    return None


class DirectDecoder:
    """Decodes from the model's parameters; see the module's docstring. Valid as long as the parameters exist."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        core: Any = model.model
        attention = core.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.eps: float = config.rms_norm_eps
        self.activation: Callable[[Tensor], Tensor] = core.layers[0].mlp.act_fn
        self.rotary = core.rotary_emb
        self.embedding: Tensor = core.embed_tokens.weight
        self.final_norm: Tensor = core.norm.weight
        self.head = _linear(model.lm_head)
        self.blocks = [_block(layer) for layer in core.layers]
        shape = LayerShape(config.num_key_value_heads, self.head_dim, self.head_dim, self.embedding.dtype)
        self.shapes = [shape] * len(self.blocks)

    def prefill(self, tokens: Tensor, step: PrefillStep) -> None:
        """Cache the prompts ``tokens`` ``[N, S]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        hidden = embedding(tokens, self.embedding)
        turn = self._rotation(hidden, positions)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            normed = rms_norm(hidden, hidden.shape[-1:], block.input_norm, self.eps)
            key = turn(self._heads(normed, block.key, block.key_norm)).transpose(1, 2)
            value = self._heads(normed, block.value, None).transpose(1, 2)
            step.write(index, key, value)
            if index == last:
                return  # nothing reads this layer's output
            query = turn(self._heads(normed, block.query, block.query_norm)).transpose(1, 2)
            attended = step.attend(query, key, value, block.attention)
            hidden = hidden + linear(attended.transpose(1, 2).flatten(2), *block.output)
            hidden = hidden + self._mlp(hidden, block)

    def decode(self, tokens: Tensor, step: DecodeStep) -> Tensor:
        """Cache one more token per row and return the logits ``[R, V]`` after it."""
        hidden = embedding(tokens, self.embedding)
        turn = self._rotation(hidden, step.positions[None])
        for index, block in enumerate(self.blocks):
            normed = rms_norm(hidden, hidden.shape[-1:], block.input_norm, self.eps)
            query = turn(self._heads(normed, block.query, block.query_norm))
            key = turn(self._heads(normed, block.key, block.key_norm))
            value = self._heads(normed, block.value, None)
            keys, values = step.append(index, key, value)
            attended = step.attend(query, keys, values, block.attention)
            hidden = hidden + linear(attended.flatten(1), *block.output)
            hidden = hidden + self._mlp(hidden, block)
        hidden = rms_norm(hidden, hidden.shape[-1:], self.final_norm, self.eps)
        return linear(hidden, *self.head)

    def _heads(self, hidden: Tensor, projection: tuple[Tensor, Tensor | None], norm: Tensor | None) -> Tensor:
        """Project to ``[..., heads, dim]``, normalised per head where the model does."""
        heads = linear(hidden, *projection).unflatten(-1, (-1, self.head_dim))
        return heads if norm is None else rms_norm(heads, (self.head_dim,), norm, self.eps)

    def _mlp(self, hidden: Tensor, block: _Block) -> Tensor:
        normed = rms_norm(hidden, hidden.shape[-1:], block.mlp_norm, self.eps)
        gated = self.activation(linear(normed, *block.gate)).mul_(linear(normed, *block.up))
        return linear(gated, *block.down)

    def _rotation(self, hidden: Tensor, positions: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function that rotates ``[..., heads, dim]`` by the angles of ``positions``.

        Rotary embedding (Su et al., 2021) of halves, not of pairs.
        """
        cos, sin = (part.squeeze(0).unsqueeze(-2) for part in self.rotary(hidden, positions))
        half = self.head_dim // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

        def turn(heads: Tensor) -> Tensor:
            swapped = torch.cat([heads[..., half:], heads[..., :half]], dim=-1)
            return torch.addcmul(heads * cos, swapped, signed)

        return turn


def _block(layer: Any) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    return _Block(
        input_norm=layer.input_layernorm.weight,
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        output=_linear(attention.o_proj),
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        attention=AttentionKind(attention.scaling, _window(attention)),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
    )


def _window(attention: Any) -> int | None:
    """Return the layer's window: Mistral has one in the configuration, Qwen one in each layer, Llama none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    return module.weight, module.bias
