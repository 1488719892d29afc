"""Checks of a batch, its division into micro-batches, and their results in the order of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch

from rlcore.batch import Batch, Jagged
from rlcore.batch import micro_batches as balanced
from rlcore.engines import ForwardRequest, ModelSettings
from rlcore.engines.settings import Head
from rlcore.engines.train import Output
from rlcore.errors import EngineError
from rlcore_kit.model_folder.length import check_sequences

POLICY_OUTPUTS = frozenset(get_args(Output)) - {"values"}
_FIELDS = {
    "candidate_logprobs": "candidates",
    "top_ids": "top_k",
    "top_logprobs": "top_k",
    "divergence": "comparison",
}
"""What an output is made of, in the request."""


def check_request(request: ForwardRequest, head: Head, adapters: bool, training: bool = False) -> None:
    """Check that a model with ``head`` computes the requested outputs.

    Args:
        adapters: whether the model has adapters.
        training: the outputs are for an optimizer step.

    Raises:
        EngineError: it has no such output, the temperature is not positive, or there are no adapters to leave out.
    """
    known = POLICY_OUTPUTS if head == "policy" else {"values"}
    for name in request.outputs:
        if name not in known:
            raise EngineError(f"a {head} head computes {', '.join(sorted(known))}, not {name}")
        field = _FIELDS.get(name)
        if field is not None and not getattr(request, field):
            raise EngineError(f"the output {name} needs ForwardRequest.{field}")
    if request.temperature <= 0:
        raise EngineError(f"temperature must be positive, not {request.temperature}")
    if not request.adapters and not adapters:
        raise EngineError(
            "a forward pass without adapters (adapters=False) needs an engine that trains adapters; this one trains "
            "all weights, and a reference policy needs a separate engine"
        )
    if not request.adapters and training:
        raise EngineError("an objective cannot request outputs without adapters (adapters=False): nothing would train")
    if request.embedding_noise and not training:
        raise EngineError("embedding_noise is for training; a forward pass without gradient has none")


def check_batch(batch: Batch, settings: ModelSettings, config: Any, vocabulary: int, request: ForwardRequest) -> None:
    """Check that the model has a position for every token of ``batch``, and knows all token ids.

    Args:
        config: configuration of transformers.
        vocabulary: number of token ids of the model.

    Raises:
        EngineError: a sequence is too long for the rotary scaling, or a token is outside of the vocabulary.
    """
    check_sequences(settings, config, batch.lengths)
    vocabulary = min(vocabulary, request.vocabulary or vocabulary)
    for name in ("tokens", *([request.candidates] if request.candidates is not None else [])):
        ids = batch.flat(name)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
            raise EngineError(
                f"{name} from {int(ids.min())} to {int(ids.max())} do not fit the vocabulary of {vocabulary} of "
                f"{settings.path!r}; does the tokenizer belong to the model?"
            )


def inputs_of(batch: Batch, request: ForwardRequest) -> Batch:
    """Return the columns from which a forward pass computes the outputs of ``request``."""
    return batch.select(*(name for name in ("tokens", "loss_mask", *request.columns) if name in batch))


def columns_at(batch: Batch, positions: torch.Tensor, request: ForwardRequest) -> dict[str, torch.Tensor]:
    """Return the entries ``[P, ...]`` of ``request.columns`` at ``positions``.

    Raises:
        BatchError: ``batch`` lacks one.
    """
    return {name: batch.flat(name)[positions] for name in request.columns}


def micro_batches(batch: Batch, max_tokens: int, together: str | None, count: Callable[[int], int]) -> list[list[int]]:
    """Divide ``batch`` under a token budget; return the indices of each micro-batch.

    Args:
        max_tokens: token budget of a micro-batch.
        together: column whose units stay in one micro-batch; see `ForwardRequest`.
        count: returns the number of micro-batches that all ranks compute, for the number that this rank has; the
            missing ones are empty.
    """
    return _with_empty_ones(batch.micro_batches(max_tokens, together), count)


def micro_batches_of_families(
    families: Sequence[Sequence[int]], sizes: Sequence[int], max_tokens: int, count: Callable[[int], int]
) -> list[list[int]]:
    """Divide a batch whose rows are in ``families`` of ``sizes`` tokens, none of which is torn; see `micro_batches`."""
    divided = balanced(sizes, max_tokens)
    return _with_empty_ones([sorted(row for index in part for row in families[index]) for part in divided], count)


def _with_empty_ones(divided: list[list[int]], count: Callable[[int], int]) -> list[list[int]]:
    return divided + [[] for _ in range(count(max(1, len(divided))) - len(divided))]


def in_order(columns: Mapping[str, torch.Tensor], lengths: torch.Tensor, order: Sequence[int]) -> Batch:
    """Return ``columns``, whose sequences have the given ``order``, as a batch in the order of samples.

    Args:
        columns: ``[T]`` each, the results of one micro-batch after another.
        lengths: ``[B]`` lengths of the sequences in these columns.
        order: sample of each of these sequences.
    """
    jagged = Batch({name: Jagged(values, lengths) for name, values in columns.items()})
    return jagged.take(torch.tensor(order, dtype=torch.int64).argsort())
