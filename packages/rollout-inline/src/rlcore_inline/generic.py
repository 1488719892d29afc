"""The generic decoder: any architecture, through the model's own forward pass.

A model that calls transformers' attention interface hands its keys and values to the `Cache` it was given and then
calls the attention function its configuration names. Both are ours while we generate, so the slot cache works under
every such model, custom ones included.
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

# The attention interface passes neither cache nor anything of ours, so the step travels beside the call.
_step: ContextVar[PrefillStep | DecodeStep] = ContextVar("step")


class _ShapeRecorder(Cache):
    """Notes what every layer caches."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, LayerShape] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.shapes[layer_idx] = LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1], keys.dtype)
        return keys, values


class _StepCache(Cache):
    """What the model takes for its cache: stores new keys and values, returns what its queries shall see."""

    def __init__(self, step: PrefillStep | DecodeStep) -> None:
        super().__init__(layers=[])
        self.step = step

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if isinstance(self.step, DecodeStep):
            return self.step.append(layer_idx, keys[:, :, 0], values[:, :, 0])
        self.step.write(layer_idx, keys, values)
        return keys, values


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
    """The attention function: ``[N, heads, S, dim]`` queries to ``[N, S, heads, dim]``."""
    kind = AttentionKind(scaling, sliding_window, softcap)
    step = _step.get()
    if isinstance(step, DecodeStep):
        return step.attend(query[:, :, 0], key, value, kind, s_aux)[:, None], None
    return step.attend(query, key, value, kind, s_aux).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)


class GenericDecoder:
    """See the module's text."""

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
        """Logits ``[R, V]`` after one more token per row."""
        return self._forward(tokens[:, None], step.positions[:, None], step)[:, -1]

    def _forward(self, tokens: Tensor, positions: Tensor, step: PrefillStep | DecodeStep) -> Tensor:
        with own_attention(self.model.config, step):
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=_StepCache(step),
                use_cache=True,
                **self._options,
            ).logits


@torch.no_grad()
def discover_shapes(model: nn.Module) -> list[LayerShape]:
    """What each layer caches, learnt from a forward pass over two tokens."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise EngineError(
            f"the inline rollout cannot generate with {type(model).__name__}: its layers of type "
            f"{', '.join(sorted(kinds))} keep a state that is no key-value cache; use another rollout engine"
        )
    recorder = _ShapeRecorder()
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    with own_attention(config, PrefillStep()):
        model(input_ids=tokens, position_ids=torch.arange(2, device=tokens.device)[None], past_key_values=recorder)
    layers = sorted(recorder.shapes)
    if not layers or layers != list(range(len(layers))):
        raise EngineError(
            f"the inline rollout cannot generate with {type(model).__name__}: it does not use the cache it is given in "
            "every layer; use another rollout engine"
        )
    return [recorder.shapes[layer] for layer in layers]


@contextmanager
def own_attention(config: Any, step: PrefillStep | DecodeStep) -> Iterator[None]:
    """Our attention function in place of the model's, working on ``step``."""
    token = _step.set(step)
    try:
        with attention_implementation(config, ATTENTION):
            yield
    finally:
        _step.reset(token)


@contextmanager
def attention_implementation(config: Any, name: str) -> Iterator[None]:
    """The model of ``config`` attends by the function registered as ``name``."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
