"""A check that a decoder computes what the model computes, before it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlcore.errors import EngineError
from rlcore_fsdp.inline.attention import DecodeStep, PrefillStep
from rlcore_fsdp.inline.generic import attention_implementation
from rlcore_fsdp.inline.kv_cache import BLOCK, KVCache
from rlcore_fsdp.inline.scheduler import Decoder

LENGTHS = (7, 4)
DECODED = 3
# Largest deviation of logits allowed, relative to their standard deviation. A wrong mask, position or missing term
# shows at once; the bounds leave room for another order of summation only.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.25


@torch.no_grad()
def deviation(model: nn.Module, decoder: Decoder, device: torch.device) -> float:
    """Largest difference of logits, in standard deviations, to the model's plain forward pass over whole sequences.

    Two sequences of different lengths are prefilled together and continued token by token.
    """
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (len(LENGTHS), max(LENGTHS) + DECODED), generator=generator).to(device)
    cache = KVCache(decoder.shapes, BLOCK * len(LENGTHS), device)
    rows = torch.arange(len(LENGTHS), device=device)
    decoder.prefill(tokens[:, : max(LENGTHS)], PrefillStep(cache, rows))
    lengths = torch.tensor(LENGTHS, device=device)
    ours = []
    for step in range(DECODED):
        positions = lengths + step
        new = tokens.gather(1, positions[:, None])[:, 0]
        ours.append(decoder.decode(new, DecodeStep(cache, positions, max(LENGTHS) + step)))
    worst = 0.0
    for row, length in enumerate(LENGTHS):
        whole = tokens[row : row + 1, : length + DECODED]
        with attention_implementation(config, "eager"):
            plain = model(input_ids=whole, use_cache=False).logits[0, length:].float()
        own = torch.stack([logits[row] for logits in ours]).float()
        worst = max(worst, float((own - plain).abs().max() / plain.std()))
    return worst


def verify(model: nn.Module, decoder: Decoder, device: torch.device) -> None:
    """Raise `EngineError` if ``decoder`` does not compute what ``model`` does."""
    found = deviation(model, decoder, device)
    allowed = TOLERANCE.get(decoder.shapes[0].dtype, LOW_PRECISION_TOLERANCE)
    if not found <= allowed:
        raise EngineError(
            f"the inline rollout cannot generate with {type(model).__name__}: token by token its logits deviate from "
            f"its forward pass by {found:.2g} standard deviations (allowed: {allowed:g}); use another rollout engine"
        )
