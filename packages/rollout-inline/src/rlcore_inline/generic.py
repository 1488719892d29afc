"""The generic decoder: any architecture, by calls of the model's forward.

A model with transformers' attention interface gives its keys and values to a `Cache` argument, and then calls the
attention function that its configuration names. This module provides both during generation, so that `KVCache` works
with every such model, including custom ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from rlcore.errors import EngineError
from rlcore_inline.attention import AttentionKind, DecodeStep, PrefillStep
from rlcore_inline.kv_cache import LayerShape

ATTENTION = "rlcore_inline"

# The attention interface has no parameter for the step, so a context variable passes it to the attention function.
_step: ContextVar[PrefillStep | DecodeStep] = ContextVar("step")


class _ShapeRecorder(Cache):
    """Records what every layer caches."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, LayerShape] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        heads, key_dim, value_dim = key_states.shape[1], key_states.shape[-1], value_states.shape[-1]
        self.shapes[layer_idx] = LayerShape(heads, key_dim, value_dim, key_states.dtype)
        return key_states, value_states


class _StepCache(Cache):
    """The model's cache argument: stores new keys and values, and returns those that the queries attend to."""

    def __init__(self, step: PrefillStep | DecodeStep) -> None:
        super().__init__(layers=[])
        self.step = step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if isinstance(self.step, DecodeStep):
            return self.step.append(layer_idx, key_states[:, :, 0], value_states[:, :, 0])
        self.step.write(layer_idx, key_states, value_states)
        return key_states, value_states


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: queries ``[N, heads, S, dim]`` to results ``[N, S, heads, dim]``."""
    kind = AttentionKind(scaling, sliding_window, softcap)
    step = _step.get()
    if isinstance(step, DecodeStep):
        return step.attend(query[:, :, 0], key, value, kind, s_aux)[:, None], None
    return step.attend(query, key, value, kind, s_aux).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)


class GenericDecoder:
    """Decodes with the model's forward; see the module's docstring."""

    def __init__(self, model: nn.Module, shapes: list[LayerShape] | None = None) -> None:
        self.model = model
        self.shapes = discover_shapes(model) if shapes is None else shapes
        knows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if knows else {}

    def prefill(self, tokens: Tensor, step: PrefillStep) -> None:
        """Cache the prompts ``tokens`` ``[N, S]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        self._forward(tokens, positions, step)

    def decode(self, tokens: Tensor, step: DecodeStep) -> Tensor:
        """Cache one more token per row and return the logits ``[R, V]`` after it."""
        return self._forward(tokens[:, None], step.positions[:, None], step)[:, -1]

    def _forward(self, tokens: Tensor, positions: Tensor, step: PrefillStep | DecodeStep) -> Tensor:
        with step_attention(self.model.config, step):
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=_StepCache(step),
                use_cache=True,
                **self._options,
            ).logits


@torch.no_grad()
def discover_shapes(model: nn.Module) -> list[LayerShape]:
    """Find the shape of what each layer caches by a forward pass over two tokens.

    Raises:
        EngineError: a layer has no key-value cache, or does not use the cache argument.
    """
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise EngineError(
            f"the inline rollout cannot generate with {type(model).__name__}: its layers of type "
            f"{', '.join(sorted(kinds))} have a state that is not a key-value cache; use another rollout engine"
        )
    recorder = _ShapeRecorder()
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    with step_attention(config, PrefillStep()):
        model(input_ids=tokens, position_ids=torch.arange(2, device=tokens.device)[None], past_key_values=recorder)
    layers = sorted(recorder.shapes)
    if not layers or layers != list(range(len(layers))):
        raise EngineError(
            f"the inline rollout cannot generate with {type(model).__name__}: not every layer uses the cache argument; "
            "use another rollout engine"
        )
    return [recorder.shapes[layer] for layer in layers]


@contextmanager
def step_attention(config: Any, step: PrefillStep | DecodeStep) -> Iterator[None]:
    """Replace the model's attention function by the one of this module, which works on ``step``."""
    token = _step.set(step)
    try:
        with attention_implementation(config, ATTENTION):
            yield
    finally:
        _step.reset(token)


@contextmanager
def attention_implementation(config: Any, name: str) -> Iterator[None]:
    """Let the model of ``config`` use the attention function that is registered as ``name``."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
