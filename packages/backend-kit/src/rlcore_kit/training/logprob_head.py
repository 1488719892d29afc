"""Log-probs and entropies of a language-model head, without ever holding the logits of all tokens.

The vocabulary projection runs over chunks of tokens, forward and backward. Between the two passes only the
log-normaliser and the entropy of each token are kept; the backward pass computes the logits a second time. With ``z``
the processed logits, ``p = softmax(z)``, ``lse = log Σ exp z`` and ``H = lse − Σ p z``:

    ∂ log p_y / ∂z = 1_y − p        ∂H / ∂z = −p · (log p + H)

Under tensor parallelism every rank holds a part of the vocabulary (`VocabularyShard`): no rank ever holds a row of
logits over the full vocabulary, and four numbers per token are reduced over the ranks (the largest logit, Σ exp z,
Σ exp z · z and the logit of the target).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Elements of one chunk of logits where the number of tokens is not configured: 128 MiB (CPU), 1 GiB (CUDA) in fp32.
_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}


@dataclass(frozen=True)
class LogitsRule:
    """What the architecture does between the projection and the softmax: ``cap · tanh(scale · x / cap)``."""

    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary whose rows of the output matrix a tensor-parallel rank holds.

    Attributes:
        first: token id of the shard's first row.
        size: rows of the largest shard, the same on all ranks; it determines the size of chunks.
        process_group: the ranks that share the vocabulary.
    """

    first: int
    size: int
    process_group: dist.ProcessGroup


def logprobs_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    rule: LogitsRule = LogitsRule(),
    chunk: int | None = None,
    with_entropy: bool = True,
    shard: VocabularyShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the log-prob of each target and the entropy of each distribution, both ``[P]`` fp32 with gradient.

    With a ``shard`` the call is collective and the results are the same on all ranks. The gradient of ``weight`` is
    then that of this rank's rows, and the gradient of ``hidden`` this rank's term of a sum over the ranks.

    Args:
        hidden: ``[P, hidden]``; under tensor parallelism the same on all ranks.
        weight: ``[vocabulary, hidden]``, or this rank's rows without padding (which may be none).
        bias: ``[vocabulary]`` or None.
        targets: ``[P]`` int64, token ids of the full vocabulary.
        temperature: divides the logits; positive.
        chunk: tokens per chunk, the same on all ranks; None bounds the memory of a chunk.
        with_entropy: False saves two passes over the logits and returns None for the entropy.
        shard: this rank's part of the vocabulary; None if ``weight`` has the full vocabulary.
    """
    size = chunk_size(chunk, hidden.device, shard.size if shard else len(weight))
    return _LogprobHead.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, weight, bias, targets, temperature, rule, size, with_entropy, shard
    )


def chunk_size(configured: int | None, device: torch.device, vocabulary: int) -> int:
    """Return the number of tokens whose logits exist at a time, where a process holds ``vocabulary`` rows."""
    return configured or max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 25) // max(1, vocabulary))


class _LogprobHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        rule: LogitsRule,
        size: int,
        with_entropy: bool,
        shard: VocabularyShard | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        count = len(hidden)
        largest = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
        # per token: Σ exp(z − largest), Σ exp(z − largest) · z, z of the target
        sums = hidden.new_zeros(3, count, dtype=torch.float32)
        for start in range(0, count, size):
            rows = slice(start, start + size)
            z, _ = _logits(hidden[rows], weight, bias, temperature, rule)
            if len(weight):
                largest[rows] = z.amax(-1)
            if shard is not None:
                dist.all_reduce(largest[rows], op=dist.ReduceOp.MAX, group=shard.process_group)
            index, held = _columns_of(targets[rows], len(weight), shard)
            sums[2, rows] = _where(held, z.gather(-1, index)).sum(-1)
            if with_entropy:
                weights = (z - largest[rows, None]).exp_()
                sums[1, rows] = torch.linalg.vecdot(weights, z)
            else:
                weights = z.sub_(largest[rows, None]).exp_()
            sums[0, rows] = weights.sum(-1)
        if shard is not None:
            dist.all_reduce(sums, group=shard.process_group)
        normaliser = sums[0].log().add_(largest)
        entropy = normaliser - sums[1] / sums[0] if with_entropy else None
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.settings = temperature, rule, size, shard
        return sums[2] - normaliser, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        temperature, rule, size, shard = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            z, squashed = _logits(hidden[rows], weight, bias, temperature, rule)
            logp = z.sub_(normaliser[rows, None])
            grad_logprobs, grad_entropy = (None if grad is None else grad[rows, None] for grad in grads)
            grad = _logits_gradient(logp, grad_logprobs, grad_entropy, None if entropy is None else entropy[rows, None])
            if grad_logprobs is not None:
                index, held = _columns_of(targets[rows], len(weight), shard)
                grad.scatter_add_(-1, index, _where(held, grad_logprobs))
            if squashed is not None:
                grad.mul_(1 - squashed.square_())
            grad = grad.mul_(rule.scale / temperature).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if grad.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, hidden[rows])
                else:
                    grad_weight += grad.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        weight_grad = None if grad_weight is None else grad_weight.to(weight.dtype)
        bias_grad = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, weight_grad, bias_grad, *[None] * 6


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, rule: LogitsRule
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return fp32 logits over temperature ``[C, vocabulary]``, and ``tanh`` of the soft cap if there is one."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if rule.cap is None:
        factor = rule.scale / temperature
        return (logits.mul_(factor) if factor != 1 else logits), None
    squashed = logits.mul_(rule.scale / rule.cap).tanh_()
    return squashed * (rule.cap / temperature), squashed


def _logits_gradient(
    logp: torch.Tensor,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Return the gradient ``[C, vocabulary]`` of the logits except for the term of the targets; overwrites ``logp``."""
    if grad_entropy is None:
        assert grad_logprobs is not None
        return logp.exp_().neg_().mul_(grad_logprobs)
    assert entropy is not None
    p = logp.exp()
    grad = logp.add_(entropy).mul_(-grad_entropy)
    if grad_logprobs is not None:
        grad.sub_(grad_logprobs)
    return grad.mul_(p)


def _columns_of(
    targets: torch.Tensor, width: int, shard: VocabularyShard | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the column of each target and whether it is one of this rank's ``width`` columns (None: all are).

    Both are ``[C, 1]``, or ``[C, 0]`` if the rank holds no column.
    """
    if shard is None:
        return targets[:, None], None
    index = targets[:, None] - shard.first
    held = (index >= 0) & (index < width)
    if width == 0:
        return index[:, :0], held[:, :0]
    return index.clamp(0, width - 1), held


def _where(held: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` where this rank holds the target's column and 0 elsewhere."""
    return values if held is None else torch.where(held, values, 0)
