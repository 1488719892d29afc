"""Sampling parameters of training, of validation, and of a baseline."""

from __future__ import annotations

from dataclasses import replace

from rlcore.engines import SamplingParams
from rlcore_recipes.settings import RolloutSettings


def training_sampling(settings: RolloutSettings, max_tokens: int, stop_tokens: tuple[int, ...] = ()) -> SamplingParams:
    """Return the sampling parameters of training.

    Args:
        max_tokens: maximum length of a completion.
        stop_tokens: tokens that end a completion in addition to the model's end tokens.
    """
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        stop=tuple(settings.stop),
        stop_token_ids=stop_tokens,
    )


def validation_sampling(
    settings: RolloutSettings, max_tokens: int, stop_tokens: tuple[int, ...] = ()
) -> SamplingParams:
    """Return the sampling parameters of validation; see `training_sampling`."""
    chosen = settings.validation
    return replace(
        training_sampling(settings, max_tokens, stop_tokens),
        temperature=chosen.temperature,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        min_p=chosen.min_p,
        logprobs=False,
    )


def greedy(sampling: SamplingParams) -> SamplingParams:
    """Return ``sampling`` without randomness and without log-probs."""
    return replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=False)
