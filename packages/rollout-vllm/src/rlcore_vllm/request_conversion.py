"""Conversion of requests and completions between rlcore and vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcore.engines.rollout import Completion, FinishReason, GenerationRequest
from rlcore.errors import EngineError
from rlcore_kit.serving.wire_format import ending_tokens

SEEDS = 2**63
"""vLLM passes seeds to torch's generators as signed 64-bit numbers."""

NO_OVERRIDES: Mapping[str, Any] = {}


def sampling_params(
    request: GenerationRequest,
    max_model_len: int,
    end_tokens: frozenset[int],
    seed: int,
    overrides: Mapping[str, Any] = NO_OVERRIDES,
) -> Any:
    """Return vLLM's ``SamplingParams`` for ``request``.

    Args:
        end_tokens: the model's end-of-sequence tokens. They are passed as stop tokens, because vLLM takes them from the
            tokenizer, which may disagree with the model.
        seed: for a request that has none.
        overrides: further fields of vLLM's ``SamplingParams``.

    Raises:
        EngineError: vLLM refuses a field.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = request.sampling
    fields: dict[str, Any] = {
        "max_tokens": min(wanted.max_tokens, max_model_len - len(request.prompt)),
        "temperature": wanted.temperature,
        "top_k": wanted.top_k,
        "top_p": wanted.top_p,
        "min_p": wanted.min_p,
        "stop": list(wanted.stop) or None,
        "include_stop_str_in_output": True,
        "stop_token_ids": sorted(ending_tokens(request, end_tokens)),
        "ignore_eos": True,
        "seed": (seed if wanted.seed is None else wanted.seed) % SEEDS,
        "logprobs": 0 if wanted.logprobs else None,
        "flat_logprobs": True,
        "detokenize": bool(wanted.stop),
        "skip_special_tokens": False,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    try:
        return SamplingParams(**{**fields, **overrides})
    except (ValueError, TypeError) as error:
        raise EngineError(f"vLLM refuses the sampling of request {request.request_id!r}: {error}") from error


def completion(request: GenerationRequest, output: Any) -> Completion:
    """Return the `Completion` in vLLM's ``RequestOutput``."""
    (made,) = output.outputs
    reasons: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
    tokens = list(made.token_ids)
    return Completion(
        tokens=tokens,
        logprobs=_sampled_logprobs(made.logprobs, len(tokens)) if request.sampling.logprobs else [],
        finish_reason=reasons.get(made.finish_reason, "abort"),
        versions=[(_number(span.version), span.end - span.start) for span in made.weight_versions or ()],
        request_id=request.request_id,
    )


def _sampled_logprobs(flat: Any, count: int) -> list[float]:
    """Return the log-prob of the token sampled at each position, which vLLM lists first."""
    if flat is None:
        return []
    return [float(flat.logprobs[start]) for start in flat.start_indices[:count]]


def _number(version: str) -> int:
    return int(version) if version.lstrip("-").isdigit() else 0  # "default" before the first update
