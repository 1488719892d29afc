"""Between rlcore's requests and the server's endpoint of token ids, ``/inference/v1/generate``."""

from __future__ import annotations

from typing import Any

from rlcore.engines.rollout import Completion, FinishReason, GenerationRequest
from rlcore.errors import WorkerError
from rlcore_kit.serving.versions import Versions
from rlcore_vllm.requests import SEEDS

PATH = "/inference/v1/generate"
ID_PREFIX = "generate-tokens-"
"""What the server puts before the id of a request, and expects when the request is to be aborted (0.32)."""


def body(
    request: GenerationRequest, request_id: str, model: str, limit: int, end_tokens: frozenset[int], priority: bool
) -> dict[str, Any]:
    """The server's request.

    Args:
        request_id: unique among all that the server works at.
        limit: most tokens that there is room for.
        end_tokens: the model's end-of-sequence tokens; they go as stop tokens, because the server's own notion of them
            depends on its tokenizer.
        priority: whether the server schedules by priority; without, it refuses any other than 0.
    """
    wanted = request.sampling
    stop_token_ids = set(wanted.stop_token_ids) | (set() if wanted.ignore_eos else end_tokens)
    sampling: dict[str, Any] = {
        "max_tokens": min(wanted.max_tokens, limit),
        "temperature": wanted.temperature,
        "top_k": wanted.top_k,
        "top_p": wanted.top_p,
        "min_p": wanted.min_p,
        "stop_token_ids": sorted(stop_token_ids),
        "ignore_eos": True,
        "detokenize": bool(wanted.stop),
        "skip_special_tokens": False,
    }
    if wanted.stop:
        sampling["stop"] = list(wanted.stop)
    if wanted.seed is not None:
        sampling["seed"] = wanted.seed % SEEDS
    if wanted.logprobs:
        sampling["logprobs"] = 0  # of the sampled token alone
    return {
        "request_id": request_id,
        "model": model,
        "token_ids": list(request.prompt),
        "sampling_params": sampling,
        **({"priority": request.priority} if priority and request.priority else {}),
    }


def completion(request: GenerationRequest, answer: Any, url: str, versions: Versions) -> Completion:
    """The `Completion` in the server's answer.

    Raises:
        WorkerError: it is not what the endpoint promises.
    """
    try:
        (choice,) = answer["choices"]
        tokens = [int(token) for token in choice["token_ids"] or ()]
        logprobs: list[float] = []
        if request.sampling.logprobs and tokens:
            logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
            if len(logprobs) != len(tokens):
                raise ValueError(f"{len(tokens)} tokens, {len(logprobs)} log-probs")
        spans = [
            (versions.number(span["version"]), span["end"] - span["start"]) for span in choice["weight_versions"] or ()
        ]
        reason: FinishReason = choice["finish_reason"] if choice["finish_reason"] in ("stop", "length") else "abort"
    except (KeyError, TypeError, ValueError) as error:
        raise WorkerError(f"{url} answered a request in a form that is not {PATH}'s: {error!r}") from error
    return Completion(tokens, logprobs, reason, spans, request.request_id)
