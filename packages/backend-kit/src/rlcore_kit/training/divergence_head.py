"""Two language-model heads compared over the whole vocabulary, and the most likely tokens of one head.

As in `rlcore_kit.training.logprob_head` logits exist for a chunk of tokens at a time, forward and backward, in fp32.
With ``l`` the log-probs of the model, ``m`` those of the other model and summands ``f(l, m)`` whose sum over the
vocabulary is the divergence D, the gradient of the logits is

    ∂D / ∂z = g − p · Σ g        g = ∂f / ∂l, p = exp l

``g`` comes from automatic differentiation of the chunk's summands, so any registered divergence works. Under tensor
parallelism the sums are reduced over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rlcore_kit.training.logprob_head import (
    HeadGradients,
    LogitsRule,
    VocabularyShard,
    chunk_size,
    logits,
    through_rule,
)

_TENSORS = 6
"""Tensors ``[C, vocabulary]`` that a comparison has at a time: a chunk has so many times fewer tokens."""


PLAIN = LogitsRule()


@dataclass(frozen=True)
class FrozenHead:
    """The output layer of another model, or this rank's rows of it, on the device of the comparison.

    Attributes:
        weight: ``[vocabulary, hidden]``.
        bias: ``[vocabulary]`` or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    rule: LogitsRule = PLAIN


def divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    other_hidden: torch.Tensor,
    other: FrozenHead,
    terms: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    temperature: float = 1.0,
    rule: LogitsRule = PLAIN,
    chunk: int | None = None,
    shard: VocabularyShard | None = None,
) -> torch.Tensor:
    """Compute the divergence ``[P]`` fp32 of two distributions; ``hidden``, ``weight`` and ``bias`` have gradients.

    Args:
        hidden: ``[P, hidden]`` of the model; under tensor parallelism the same on all ranks.
        weight, bias: of the model; with a ``shard`` this rank's rows (which may be none).
        other_hidden: ``[P, other hidden]`` of the other model.
        other: as many rows as ``weight``, for the same tokens.
        terms: see `rlcore.engines.Comparison`.
        temperature: divides the logits of both models.
        chunk, shard: see `rlcore_kit.training.logprob_head.logprobs_and_entropy`.
    """
    size = chunk_size(chunk, hidden.device, shard.size if shard else len(weight))
    return _Divergence.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, bias, other_hidden, other, terms, temperature, rule, max(1, size // _TENSORS), shard
    )


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        other_hidden: torch.Tensor,
        other: FrozenHead,
        terms: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        temperature: float,
        rule: LogitsRule,
        size: int,
        shard: VocabularyShard | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, other_hidden)
        ctx.settings = other, terms, temperature, rule, size, shard
        values = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            own, _ = _logprobs(hidden[rows], weight, bias, temperature, rule, shard)
            theirs, _ = _logprobs(other_hidden[rows], other.weight, other.bias, temperature, other.rule, shard)
            values[rows] = terms(own, theirs).sum(-1)
        return _summed(values, shard)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        hidden, weight, bias, other_hidden = ctx.saved_tensors
        other, terms, temperature, rule, size, shard = ctx.settings
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            own, squashed = _logprobs(hidden[rows], weight, bias, temperature, rule, shard)
            theirs, _ = _logprobs(other_hidden[rows], other.weight, other.bias, temperature, other.rule, shard)
            with torch.enable_grad():
                own.requires_grad_()
                total = terms(own, theirs).sum(-1)
            (grad,) = torch.autograd.grad(total, own, grads[0][rows])
            grad = grad.addcmul(own.detach().exp(), _summed(grad.sum(-1, keepdim=True), shard), value=-1)
            gradients.add(rows, through_rule(grad, squashed, rule, temperature))
        return *gradients.results(), *[None] * 7


def top_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    *,
    temperature: float = 1.0,
    rule: LogitsRule = PLAIN,
    chunk: int | None = None,
    shard: VocabularyShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids (int64) of the ``k`` most likely tokens and their log-probs (fp32), ``[P, k]``, the best first.

    For the arguments see `divergence`. No gradient; the results are the same on all ranks.
    """
    size = chunk_size(chunk, hidden.device, shard.size if shard else len(weight))
    ids = hidden.new_empty(len(hidden), k, dtype=torch.int64)
    found = hidden.new_empty(len(hidden), k, dtype=torch.float32)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        own, _ = _logprobs(hidden[rows], weight, bias, temperature, rule, shard)
        values, index = own.topk(min(k, own.shape[-1]))
        if shard is not None:
            values, index = _of_all_ranks(values, index + shard.first, k, shard)
        found[rows], ids[rows] = values, index
    return ids, found


def _of_all_ranks(
    values: torch.Tensor, index: torch.Tensor, k: int, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``k`` best of the ranks' best, the lower token id first among equals."""
    ranks, missing = dist.get_world_size(shard.process_group), k - values.shape[-1]
    own = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    own_index = torch.nn.functional.pad(index, (0, missing))
    everyones, indices = ([torch.empty_like(part) for _ in range(ranks)] for part in (own, own_index))
    dist.all_gather(everyones, own.contiguous(), group=shard.process_group)
    dist.all_gather(indices, own_index.contiguous(), group=shard.process_group)
    best, place = torch.cat(everyones, -1).topk(k)
    return best, torch.cat(indices, -1).gather(-1, place)


def _logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    rule: LogitsRule,
    shard: VocabularyShard | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probs ``[C, vocabulary]`` (of this rank's tokens), and ``tanh`` of the soft cap if there is one."""
    z, squashed = logits(hidden, weight, bias, temperature, rule, unrounded=True)
    if shard is None:
        return z.log_softmax(-1), squashed
    largest = z.amax(-1) if len(weight) else z.new_full((len(z),), -torch.inf)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=shard.process_group)
    total = _summed((z - largest[:, None]).exp_().sum(-1), shard)
    return z.sub_((largest + total.log())[:, None]), squashed


def _summed(values: torch.Tensor, shard: VocabularyShard | None) -> torch.Tensor:
    if shard is not None:
        dist.all_reduce(values, group=shard.process_group)
    return values
