"""Requests and answers of vLLM's endpoint of token ids, ``/inference/v1/generate``."""

from __future__ import annotations

from typing import Any

from rlcore.engines.rollout import Completion, GenerationRequest
from rlcore_kit.serving import wire_format
from rlcore_kit.serving.weight_labels import WeightLabels
from rlcore_vllm.request_conversion import SEEDS

PATH = "/inference/v1/generate"
ID_PREFIX = "generate-tokens-"
"""Prefix that the server puts before the id of a request, and expects in an abort (0.32)."""


def body(
    request: GenerationRequest, server_id: str, model: str, max_tokens: int, end_tokens: frozenset[int], priority: bool
) -> dict[str, Any]:
    """Return the body of ``request``.

    Args:
        server_id: unique among the server's requests.
        model: name of the model.
        max_tokens: maximum number of new tokens under ``max_model_len``.
        end_tokens: the model's end-of-sequence tokens. They are sent as stop tokens, because the ones that the server
            knows depend on its tokenizer.
        priority: whether the server schedules by priority; otherwise it refuses any other than 0.
    """
    wanted = request.sampling
    sampling: dict[str, Any] = {
        "max_tokens": min(wanted.max_tokens, max_tokens),
        "temperature": wanted.temperature,
        "top_k": wanted.top_k,
        "top_p": wanted.top_p,
        "min_p": wanted.min_p,
        "stop_token_ids": sorted(wire_format.ending_tokens(request, end_tokens)),
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
        "request_id": server_id,
        "model": model,
        "token_ids": list(request.prompt),
        "sampling_params": sampling,
        **({"priority": request.priority} if priority and request.priority else {}),
    }


def completion(request: GenerationRequest, answer: Any, url: str, labels: WeightLabels) -> Completion:
    """Return the `Completion` in the server's answer.

    Raises:
        WorkerError: the answer is not in the endpoint's format.
    """

    def read() -> wire_format.Answer:
        (choice,) = answer["choices"]
        tokens = [int(token) for token in choice["token_ids"] or ()]
        logprobs: list[float] = []
        if request.sampling.logprobs and tokens:
            logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]]
        return wire_format.Answer(tokens, logprobs, choice["weight_versions"] or (), choice["finish_reason"])

    return wire_format.completion(request, read, labels, url, PATH)
