"""Parts of requests and answers that the protocols of inference servers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rlcore.engines.rollout import Completion, FinishReason, GenerationRequest
from rlcore.errors import WorkerError
from rlcore_kit.serving.weight_labels import WeightLabels


@dataclass(frozen=True)
class Answer:
    """A server's answer to one request.

    Attributes:
        tokens: sampled ids.
        logprobs: one per token; empty if the request asked for none.
        spans: mappings with "version" (a label), "start" and "end", in the order of the tokens.
        finish_reason: "stop", "length", or anything else for an aborted request.
    """

    tokens: list[int]
    logprobs: list[float]
    spans: Iterable[Mapping[str, Any]]
    finish_reason: str | None


@contextmanager
def in_format(url: str, path: str) -> Iterator[None]:
    """Read an answer of the server at ``url`` in the block.

    Raises:
        WorkerError: in the place of a KeyError, IndexError, TypeError or ValueError: the answer does not have the form
            that the endpoint ``path`` documents.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise WorkerError(f"{url} sent an answer that is not in the format of {path}: {error!r}") from error


def ending_tokens(request: GenerationRequest, end_tokens: frozenset[int]) -> frozenset[int]:
    """Return the ids that end the completion: stop tokens of ``request``, and the model's unless it ignores them."""
    sampling = request.sampling
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else end_tokens)


def completion(
    request: GenerationRequest, read: Callable[[], Answer], labels: WeightLabels, url: str, path: str
) -> Completion:
    """Return the `Completion` in an answer.

    Args:
        read: reads the answer; may raise KeyError, TypeError or ValueError.

    Raises:
        WorkerError: the answer does not have the form that the endpoint ``path`` documents.
    """
    with in_format(url, path):
        answer = read()
        if request.sampling.logprobs and len(answer.logprobs) != len(answer.tokens):
            raise ValueError(f"{len(answer.tokens)} tokens, {len(answer.logprobs)} log-probs")
        versions = [
            (labels.version_of(span["version"]), span["end"] - span["start"])
            for span in answer.spans
            if span["end"] > span["start"]
        ]
    reasons: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
    reason = reasons.get(answer.finish_reason, "abort")
    return Completion(answer.tokens, answer.logprobs, reason, versions, request.request_id)


def joined(partial: Completion, rest: Completion) -> Completion:
    """Return ``partial`` and its continuation ``rest`` as one completion."""
    versions = list(partial.versions)
    for version, count in rest.versions:
        if versions and versions[-1][0] == version:
            versions[-1] = (version, versions[-1][1] + count)
        else:
            versions.append((version, count))
    return replace(
        rest,
        tokens=[*partial.tokens, *rest.tokens],
        logprobs=[*partial.logprobs, *rest.logprobs],
        versions=versions,
    )
