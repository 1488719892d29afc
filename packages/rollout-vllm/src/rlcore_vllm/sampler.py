"""Log-probs of sampled tokens under softmax(logits / temperature), before top-k, top-p and min-p.

vLLM (0.32) returns either those of softmax(logits), or, as "processed" log-probs, those of the distribution after all
filters. Both samplers of vLLM, one per model runner, return the logits or log-probs for this from their method
``sample``, which is replaced here. Filters and random numbers stay vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

GREEDY = 1e-5
"""vLLM decodes greedily below this temperature; log-probs are then those of softmax(logits)."""


def install(model_runner: Any) -> None:
    """Make ``model_runner`` (V1 or V2) return log-probs under softmax(logits / temperature)."""
    sampler = model_runner.sampler
    sample = sampler.sample
    # set after construction, where this mode would disable the sampler's fused kernels
    sampler.logprobs_mode = "processed_logprobs"
    if hasattr(sampler, "sampling_states"):  # model runner V2

        def sample_v2(logits: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sampled, processed = sample(logits, rows, *args, **kwargs)
            if processed is logits:  # neither temperature nor filters
                return sampled, processed
            temperature = sampler.sampling_states.temperature.gpu[rows]
            return sampled, logits.float() / _divisor(temperature)

        sampler.sample = sample_v2
        return

    if model_runner.device.type == "cpu":
        sample = _rewinding(model_runner, sample)

    def sample_v1(logits: torch.Tensor, metadata: Any, logprobs_mode_override: str | None = None) -> Any:
        wanted = metadata.max_num_logprobs is not None or metadata.logprob_token_ids
        logprobs = None
        if wanted:
            # a copy, because vLLM divides and filters in place
            scaled = logits if metadata.temperature is None else logits / _divisor(metadata.temperature)
            logprobs = torch.log_softmax(scaled, dim=-1, dtype=torch.float32)
        sampled, _ = sample(logits, metadata, logprobs_mode_override="raw_logprobs")
        return sampled, logprobs

    sampler.sample = sample_v1


def _rewinding(model_runner: Any, sample: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``sample`` with the generators of rows whose token is discarded restored afterwards.

    A prompt that is prefilled in several steps draws a token in each, and only the last counts. vLLM (0.32) undoes the
    other draws by the generator's offset, which generators on the CPU do not have: requests with a seed would fail.
    """
    bookkeeping = model_runner._bookkeeping_sync

    def unused_rows() -> dict[int, torch.Generator]:
        batch = model_runner.input_batch
        rows = np.nonzero(model_runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        return {row: batch.generators[row] for row in rows if row in batch.generators}

    def rewinding_sample(*args: Any, **kwargs: Any) -> Any:
        before = [(generator, generator.get_state()) for generator in unused_rows().values()]
        result = sample(*args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return result

    def bookkeeping_without(*args: Any, **kwargs: Any) -> Any:
        unused, generators = unused_rows(), model_runner.input_batch.generators
        for row in unused:
            del generators[row]
        try:
            return bookkeeping(*args, **kwargs)
        finally:
            generators.update(unused)

    model_runner._bookkeeping_sync = bookkeeping_without
    return rewinding_sample


def _divisor(temperature: torch.Tensor) -> torch.Tensor:
    """Return the divisor of logits, ``[rows, 1]`` for ``temperature`` ``[rows]``."""
    return torch.where(temperature < GREEDY, 1.0, temperature)[:, None]
