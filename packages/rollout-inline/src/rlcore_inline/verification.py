"""Checks before a decoder is used: equality with the model's forward pass and, if required, batch invariance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlcore.engines.rollout import GenerationRequest, SamplingParams
from rlcore.errors import EngineError
from rlcore_inline.attention import INVARIANT_CHUNK, DecodeStep, PrefillStep
from rlcore_inline.generic import attention_implementation
from rlcore_inline.kv_cache import BLOCK, KVCache, whole_blocks
from rlcore_inline.scheduler import MIN_ROWS, Decoder, Scheduler
from rlcore_inline.sequence import Sequence

LENGTHS = (7, 4)
DECODED = 3
# Maximum deviation of logits, relative to their standard deviation: far below the effect of a wrong mask, position or
# missing term, far above that of another order of summation.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.25


@torch.no_grad()
def deviation(model: nn.Module, decoder: Decoder, device: torch.device) -> float:
    """Return the largest difference of logits to the model's forward pass over complete sequences.

    Two sequences of different lengths are prefilled together and continued token by token. The unit is the standard
    deviation of the logits.
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
        sequence = tokens[row : row + 1, : length + DECODED]
        with attention_implementation(config, "eager"):
            plain = model(input_ids=sequence, use_cache=False).logits[0, length:].float()
        own = torch.stack([logits[row] for logits in ours]).float()
        worst = max(worst, float((own - plain).abs().max() / plain.std()))
    return worst


def verify(model: nn.Module, decoder: Decoder, device: torch.device) -> None:
    """Raise `EngineError` if ``decoder`` and ``model`` compute different logits."""
    found = deviation(model, decoder, device)
    allowed = TOLERANCE.get(decoder.shapes[0].dtype, LOW_PRECISION_TOLERANCE)
    if not found <= allowed:
        raise EngineError(
            f"the inline rollout cannot generate with {type(model).__name__}: logits computed token by token deviate "
            f"from those of its forward pass by {found:.2g} standard deviations (maximum: {allowed:g}); use another "
            "rollout engine"
        )


def verify_invariance(model: nn.Module, decoder: Decoder, device: torch.device) -> None:
    """Raise `EngineError` if log-probs of a short or a long sequence change in any bit when other sequences run too.

    Always raises except for float32 on the CPU, for whose kernels batch invariance is implemented.
    """
    tried = device.type == "cpu" and decoder.shapes[0].dtype == torch.float32
    if not tried or _depends_on_batch(model, decoder, device):
        dtype = str(decoder.shapes[0].dtype).removeprefix("torch.")
        raise EngineError(
            f"batch_invariant is not available: with {type(model).__name__} in {dtype} on {device.type} completions "
            "depend on the other requests of a batch; set batch_invariant to false, or compute in float32 on the CPU"
        )


def _depends_on_batch(model: nn.Module, decoder: Decoder, device: torch.device) -> bool:
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    lengths = (9, INVARIANT_CHUNK + 9, *range(1, MIN_ROWS + 1))
    prompts = [tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()) for length in lengths]
    together = _greedy_logprobs(decoder, prompts, device)
    return any(_greedy_logprobs(decoder, [prompts[index]], device) != [together[index]] for index in range(2))


def _greedy_logprobs(decoder: Decoder, prompts: list[tuple[int, ...]], device: torch.device) -> list[list[float]]:
    """Generate a few greedy tokens after each prompt, together, and return their log-probs."""
    cache = KVCache(decoder.shapes, len(prompts) * whole_blocks(max(map(len, prompts)) + DECODED), device)
    scheduler = Scheduler(len(prompts), sum(map(len, prompts)), device, invariant=True)
    sampling = SamplingParams(max_tokens=DECODED, temperature=0.0, ignore_eos=True)
    sequences = [
        Sequence(
            request=GenerationRequest(prompt, sampling),
            order=(0, index),
            prompt=prompt,
            end_tokens=frozenset(),
            limit=DECODED,
            stream=index,
            stop_strings=None,
            done=lambda completion: None,
        )
        for index, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.unfinished:
        scheduler.step(decoder, cache)
    return [sequence.logprobs for sequence in sequences]
