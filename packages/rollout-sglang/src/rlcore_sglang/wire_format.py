"""Requests and answers of SGLang's endpoint ``/generate``, token ids in and out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlcore.engines.rollout import Completion, GenerationRequest
from rlcore_kit.serving import wire_format
from rlcore_kit.serving.weight_labels import WeightLabels

PATH = "/generate"
SEEDS = 2**63
"""SGLang takes seeds as signed 64-bit numbers."""


def body(
    request: GenerationRequest, server_id: str, max_tokens: int, ends: frozenset[int], adapter: str | None = None
) -> dict[str, Any]:
    """Return the body of ``request``.

    Args:
        server_id: unique among the server's requests, and no prefix of another.
        max_tokens: maximum number of new tokens under ``max_model_len``.
        adapter: name of the adapter to generate with; None: the base model alone.
        ends: ids that end the completion; see `rlcore_kit.serving.wire_format.ending_tokens`.
    """
    wanted = request.sampling
    sampling: dict[str, Any] = {
        "max_new_tokens": min(wanted.max_tokens, max_tokens),
        "temperature": wanted.temperature,
        "top_k": wanted.top_k or -1,
        "top_p": wanted.top_p,
        "min_p": wanted.min_p,
        # the server would ignore stop tokens too; see `ended_too_early`
        "ignore_eos": not ends,
        "stop_token_ids": sorted(ends),
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }
    if wanted.stop:
        sampling["stop"] = list(wanted.stop)
    if wanted.seed is not None:
        sampling["sampling_seed"] = wanted.seed % SEEDS
    return {
        "rid": server_id,
        "input_ids": list(request.prompt),
        "sampling_params": sampling,
        "return_logprob": wanted.logprobs,
        **({} if adapter is None else {"lora_path": adapter}),
    }


def completion(request: GenerationRequest, answer: Any, url: str, labels: WeightLabels) -> Completion:
    """Return the `Completion` in the server's answer.

    Raises:
        WorkerError: the answer is not in the endpoint's format.
    """

    def read() -> wire_format.Answer:
        info = answer["meta_info"]
        tokens = [int(token) for token in answer["output_ids"]]
        logprobs: list[float] = []
        if request.sampling.logprobs and tokens:
            logprobs = [float(entry[0]) for entry in info["output_token_logprobs"]]
        reason = (info["finish_reason"] or {}).get("type")
        return wire_format.Answer(tokens, logprobs, info.get("weight_versions") or (), reason)

    return wire_format.completion(request, read, labels, url, PATH)


def ended_too_early(answer: Any, ends: frozenset[int]) -> bool:
    """Return whether the server stopped at a token that does not end the completion.

    If a request has stop tokens, SGLang also stops at the end-of-sequence tokens of the model and of the tokenizer.
    """
    reason = answer["meta_info"]["finish_reason"] or {}
    matched = reason.get("matched")
    return reason.get("type") == "stop" and isinstance(matched, int) and matched not in ends


def remaining(request: GenerationRequest, partial: Completion) -> GenerationRequest:
    """Return the request for what is left of ``request`` after ``partial``; it samples the same tokens as before."""
    sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(partial.tokens))
    return replace(request, prompt=[*request.prompt, *partial.tokens], sampling=sampling)
