"""Log-probs and entropies of a language-model head, without ever holding the logits of all tokens.

`rlcore_kit.training.divergence_head` compares two heads in the same way.

The vocabulary projection runs over chunks of tokens, forward and backward. Between the two passes only the
log-normaliser and the entropy of each token are kept; the backward pass computes the logits a second time. With ``z``
the processed logits, ``p = softmax(z)``, ``lse = log Σ exp z`` and ``H = lse − Σ p z``:

    ∂ log p_y / ∂z = 1_y − p        ∂H / ∂z = −p · (log p + H)

Under tensor parallelism every rank holds a part of the vocabulary (`VocabularyShard`): no rank ever holds a row of
logits over the full vocabulary, and four numbers per token are reduced over the ranks (the largest logit, Σ exp z,
Σ exp z · z and the logit of the target).
"""

from __future__ import annotations

from collections.abc import Sequence
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
    unrounded: bool = False,
    shard: VocabularyShard | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the log-probs of the targets, shaped as these, and entropies ``[P]``, both fp32 with gradient.

    With a ``shard`` the call is collective and the results are the same on all ranks. The gradient of ``weight`` is
    then that of this rank's rows, and the gradient of ``hidden`` this rank's term of a sum over the ranks.

    Args:
        hidden: ``[P, hidden]``; under tensor parallelism the same on all ranks.
        weight: ``[vocabulary, hidden]``, or this rank's rows without padding (which may be none).
        bias: ``[vocabulary]`` or None.
        targets: ``[P]`` or ``[P, K]`` int64, token ids of the full vocabulary.
        temperature: divides the logits; positive.
        chunk: tokens per chunk, the same on all ranks; None bounds the memory of a chunk.
        with_entropy: False saves two passes over the logits and returns None for the entropy.
        unrounded: see `logits`.
        shard: this rank's part of the vocabulary; None if ``weight`` has the full vocabulary.
    """
    size = chunk_size(chunk, hidden.device, shard.size if shard else len(weight))
    columns = targets if targets.dim() == 2 else targets[:, None]
    logprobs, entropy = _LogprobHead.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, columns, temperature, rule, size, with_entropy, unrounded, shard
    )
    return logprobs.reshape(targets.shape), entropy


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
        unrounded: bool,
        shard: VocabularyShard | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        count = len(hidden)
        largest = hidden.new_full((count,), -torch.inf, dtype=torch.float32)
        # per token: Σ exp(z − largest), Σ exp(z − largest) · z, and z of each target
        sums = hidden.new_zeros(2 + targets.shape[1], count, dtype=torch.float32)
        for start in range(0, count, size):
            rows = slice(start, start + size)
            z, _ = logits(hidden[rows], weight, bias, temperature, rule, unrounded)
            if len(weight):
                largest[rows] = z.amax(-1)
            if shard is not None:
                dist.all_reduce(largest[rows], op=dist.ReduceOp.MAX, group=shard.process_group)
            if len(weight):
                index, held = _columns_of(targets[rows], len(weight), shard)
                sums[2:, rows] = _where(held, z.gather(-1, index)).T
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
        ctx.settings = temperature, rule, size, unrounded, shard
        return (sums[2:] - normaliser).T.contiguous(), entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        temperature, rule, size, unrounded, shard = ctx.settings
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            z, squashed = logits(hidden[rows], weight, bias, temperature, rule, unrounded)
            logp = z.sub_(normaliser[rows, None])
            grad_logprobs = None if grads[0] is None else grads[0][rows]
            grad_entropy = None if grads[1] is None else grads[1][rows, None]
            of_all = None if grad_logprobs is None else grad_logprobs.sum(-1, keepdim=True)
            grad = _logits_gradient(logp, of_all, grad_entropy, None if entropy is None else entropy[rows, None])
            if grad_logprobs is not None and len(weight):
                index, held = _columns_of(targets[rows], len(weight), shard)
                grad.scatter_add_(-1, index, _where(held, grad_logprobs))
            gradients.add(rows, through_rule(grad, squashed, rule, temperature))
        return *gradients.results(), *[None] * 7


class HeadGradients:
    """Gradients of hidden states, output matrix and bias, added up over chunks of tokens.

    Args:
        needed: which of the three are needed.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, needed: Sequence[bool]
    ) -> None:
        self._inputs = hidden, weight, bias
        self._hidden = torch.empty_like(hidden) if needed[0] else None
        self._weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None

    def add(self, rows: slice, grad: torch.Tensor) -> None:
        """Add what the gradient ``[C, vocabulary]`` fp32 of the projections of ``rows`` gives."""
        hidden, weight, _ = self._inputs
        grad = grad.to(weight.dtype)
        if self._hidden is not None:
            torch.mm(grad, weight, out=self._hidden[rows])
        if self._weight is not None:
            if grad.dtype == torch.float32:
                self._weight.addmm_(grad.T, hidden[rows])
            else:
                self._weight += grad.T @ hidden[rows]
        if self._bias is not None:
            self._bias += grad.sum(0, dtype=torch.float32)

    def results(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients in the precision of their inputs; None where none was needed."""
        _, weight, bias = self._inputs
        return (
            self._hidden,
            None if self._weight is None else self._weight.to(weight.dtype),
            None if self._bias is None or bias is None else self._bias.to(bias.dtype),
        )


def logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    rule: LogitsRule,
    unrounded: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return fp32 logits over temperature ``[C, vocabulary]``, and ``tanh`` of the soft cap if there is one.

    Args:
        unrounded: do not round logits to the precision of ``weight``, as the model itself does. Two models that nearly
            agree have logits whose difference is mostly this rounding in bf16.
    """
    project = _project_unrounded if unrounded else torch.nn.functional.linear
    projected = project(hidden, weight, bias).float()
    if rule.cap is None:
        factor = rule.scale / temperature
        return (projected.mul_(factor) if factor != 1 else projected), None
    squashed = projected.mul_(rule.scale / rule.cap).tanh_()
    return squashed * (rule.cap / temperature), squashed


def _project_unrounded(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden, weight, bias)
    if weight.device.type == "cuda":
        projected = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:  # has no product of two precisions
        projected = torch.mm(hidden.float(), weight.T.float())
    return projected if bias is None else projected.add_(bias)


def through_rule(
    grad: torch.Tensor, squashed: torch.Tensor | None, rule: LogitsRule, temperature: float
) -> torch.Tensor:
    """Return the gradient of the projection ``W h + b`` from that of `logits`; overwrites both arguments."""
    if squashed is not None:
        grad.mul_(1 - squashed.square_())
    return grad.mul_(rule.scale / temperature)


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

    Both are ``[C, K]``. A rank without columns does not call this.
    """
    if shard is None:
        return targets, None
    index = targets - shard.first
    return index.clamp(0, width - 1), (index >= 0) & (index < width)


def _where(held: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` where this rank holds the target's column and 0 elsewhere."""
    return values if held is None else torch.where(held, values, 0)
