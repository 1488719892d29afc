"""What a prompt must be for any rollout engine."""

from __future__ import annotations

from rlcore.engines.rollout import GenerationRequest
from rlcore.errors import EngineError


def check_prompt(request: GenerationRequest, max_model_len: int, vocabulary: int) -> None:
    """Raise `EngineError` if there is nothing to generate from, no room, or a token that the model does not know.

    Args:
        vocabulary: number of tokens that the model knows.
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
