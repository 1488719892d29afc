"""Choose the decoder for a model, check it, and allocate its cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rlcore.boundary import boundary
from rlcore.engines.settings import ModelSettings
from rlcore.errors import EngineError
from rlcore_inline import direct
from rlcore_inline.direct import DirectDecoder
from rlcore_inline.generic import GenericDecoder
from rlcore_inline.kv_cache import KVCache, whole_blocks
from rlcore_inline.scheduler import Decoder
from rlcore_inline.settings import InlineSettings
from rlcore_inline.verification import verify, verify_invariance
from rlcore_kit.model_folder.length import check_positions, check_rope
from rlcore_kit.training.memory import free_memory


def choose_decoder(
    model: PreTrainedModel,
    model_settings: ModelSettings,
    settings: InlineSettings,
    max_model_len: int,
    device: torch.device,
) -> Decoder:
    """Make the decoder that the settings and the model require, and compare it with the model's forward pass.

    Raises:
        EngineError: no decoder supports the model, its logits deviate, or the model has fewer than ``max_model_len``
            positions.
    """
    check_positions(model_settings, model.config, max_model_len)
    check_rope(model_settings, model.config, max_model_len, "the longest sequence of a rollout")
    reason = direct.unsupported_reason(model)
    if settings.decoder == "direct" and reason is not None:
        raise EngineError(f"the direct decoder cannot be used: {reason}; set decoder to 'auto' or 'generic'")
    use_direct = reason is None and settings.decoder != "generic"
    decoder: Decoder = DirectDecoder(model) if use_direct else GenericDecoder(model)
    with boundary(f"the inline rollout cannot generate with {type(model).__name__}", EngineError):
        verify(model, decoder, device)
    if settings.batch_invariant:
        verify_invariance(model, decoder, device)
    return decoder


def allocate_cache(decoder: Decoder, settings: InlineSettings, max_model_len: int, device: torch.device) -> KVCache:
    """Allocate the KV cache of ``decoder``.

    Raises:
        EngineError: it has no capacity for one sequence of ``max_model_len`` tokens.
    """
    minimum = whole_blocks(max_model_len)
    budget = settings.kv_cache_tokens
    if budget is None:
        position_bytes = sum(shape.nbytes for shape in decoder.shapes)
        affordable = int(free_memory(device) * settings.kv_cache_fraction) // position_bytes
        budget = min(settings.max_running * minimum, affordable)
    if budget < minimum:
        raise EngineError(
            f"the KV cache has a capacity of {budget} tokens, but one sequence of max_model_len {max_model_len} needs "
            f"{minimum}; raise kv_cache_tokens or kv_cache_fraction, or lower max_model_len"
        )
    return KVCache(decoder.shapes, budget, device)
