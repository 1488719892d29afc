"""Between rlcore's requests and the server's endpoint ``/generate``, token ids in and out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlcore.engines.rollout import Completion, FinishReason, GenerationRequest
from rlcore.errors import WorkerError
from rlcore_kit.serving.versions import Versions

PATH = "/generate"
SEEDS = 2**63
"""SGLang takes seeds as signed 64-bit numbers."""


def ends_of(request: GenerationRequest, end_tokens: frozenset[int]) -> frozenset[int]:
    """The tokens that end the completion."""
    wanted = request.sampling
    return frozenset(wanted.stop_token_ids) | (frozenset() if wanted.ignore_eos else end_tokens)


def body(request: GenerationRequest, server_id: str, limit: int, ends: frozenset[int]) -> dict[str, Any]:
    """The server's request.

    Args:
        server_id: unique among all that the server works at, and no prefix of another.
        limit: most tokens that there is room for.
        ends: see `ends_of`.
    """
    wanted = request.sampling
    sampling: dict[str, Any] = {
        "max_new_tokens": min(wanted.max_tokens, limit),
        "temperature": wanted.temperature,
        "top_k": wanted.top_k or -1,
        "top_p": wanted.top_p,
        "min_p": wanted.min_p,
        # it would ignore stop tokens, too; see `ended_too_early`
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
    }


def completion(request: GenerationRequest, answer: Any, url: str, versions: Versions) -> Completion:
    """The `Completion` in the server's answer.

    Raises:
        WorkerError: it is not what the endpoint promises.
    """
    try:
        about = answer["meta_info"]
        tokens = [int(token) for token in answer["output_ids"]]
        logprobs: list[float] = []
        if request.sampling.logprobs:
            logprobs = [float(entry[0]) for entry in about["output_token_logprobs"]] if tokens else []
            if len(logprobs) != len(tokens):
                raise ValueError(f"{len(tokens)} tokens, {len(logprobs)} log-probs")
        spans = [
            (versions.number(span["version"]), span["end"] - span["start"])
            for span in about.get("weight_versions") or ()
            if span["end"] > span["start"]
        ]
        kind = (about["finish_reason"] or {}).get("type")
        reason: FinishReason = kind if kind in ("stop", "length") else "abort"
    except (KeyError, TypeError, ValueError) as error:
        raise WorkerError(f"{url} answered a request in a form that is not {PATH}'s: {error!r}") from error
    return Completion(tokens, logprobs, reason, spans, request.request_id)


def ended_too_early(request: GenerationRequest, answer: Any, ends: frozenset[int]) -> bool:
    """Whether the server stopped at a token that ends nothing for us.

    Where there are stop tokens it stops at the end-of-sequence tokens of the model and of the tokenizer as well.
    """
    reason = answer["meta_info"]["finish_reason"] or {}
    matched = reason.get("matched")
    return reason.get("type") == "stop" and isinstance(matched, int) and matched not in ends


def continued(request: GenerationRequest, made: Completion) -> GenerationRequest:
    """What is left of ``request`` when ``made`` is there; draws the same tokens as if it had not been interrupted."""
    left = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(made.tokens))
    return replace(request, prompt=[*request.prompt, *made.tokens], sampling=left)


def joined(made: Completion, more: Completion) -> Completion:
    """Both parts of one completion as one."""
    versions = list(made.versions)
    for version, count in more.versions:
        if versions and versions[-1][0] == version:
            versions[-1] = (version, versions[-1][1] + count)
        else:
            versions.append((version, count))
    return replace(
        more,
        tokens=[*made.tokens, *more.tokens],
        logprobs=[*made.logprobs, *more.logprobs],
        versions=versions,
    )
