"""Checks of a prompt that all rollout engines share."""

from __future__ import annotations

from rlcore.engines.rollout import GenerationRequest
from rlcore.errors import EngineError


def check_prompt(request: GenerationRequest, max_model_len: int, vocabulary: int) -> None:
    """Raise `EngineError` if the prompt is empty, leaves no room for a completion, or has a token that does not exist.

    Args:
        max_model_len: maximum number of tokens of prompt and completion together.
        vocabulary: number of tokens of the model.
    """
    prompt = request.prompt
    if not len(prompt):
        raise EngineError(f"request {request.request_id!r} has an empty prompt; give it at least one token")
    if len(prompt) >= max_model_len:
        raise EngineError(
            f"the prompt of request {request.request_id!r} has {len(prompt)} tokens, which leaves no room under "
            f"max_model_len {max_model_len}; shorten it or raise max_model_len"
        )
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise EngineError(
            f"the prompt of request {request.request_id!r} holds a token outside the model's vocabulary of "
            f"{vocabulary}; was it made with another tokenizer?"
        )
