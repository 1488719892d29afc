"""Log-probs and entropies of a head whose vocabulary is divided over tensor-parallel ranks.

No rank ever holds a row of logits over the whole vocabulary, nor its own columns of all tokens: the projection runs
over chunks of tokens, forward and backward, and three numbers per token are summed over the ranks. With ``z`` the
logits over temperature, ``p = softmax(z)``, ``lse = log Σ exp z`` and ``H = lse − Σ p z``:

    ∂ log p_y / ∂z = 1_y − p        ∂H / ∂z = −p · (log p + H)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# Elements of one chunk of logits where the number of tokens is not configured: 128 MiB (CPU), 1 GiB (CUDA) in fp32.
_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}


def logprobs_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    first: int,
    group: dist.ProcessGroup,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of each target and entropy of each distribution, both ``[P]`` fp32, the same on all ranks of ``group``.

    Their gradient towards ``weight`` is this rank's, and that towards ``hidden`` its part of a sum over the ranks.

    Args:
        hidden: ``[P, hidden]``, the same on all ranks.
        weight: ``[columns, hidden]``, this rank's part of the vocabulary, without padding; it may have no rows.
        targets: ``[P]`` int64, in the whole vocabulary.
        first: the token that ``weight[0]`` stands for.
        chunk: tokens per chunk, the same on all ranks; None bounds the chunk's memory.
        with_entropy: False saves work and returns None for the entropy.
    """
    if chunk is None:
        columns = torch.tensor(len(weight), device=weight.device)
        dist.all_reduce(columns, op=dist.ReduceOp.MAX, group=group)
        chunk = chunk_size(None, hidden.device, int(columns))
    return _Head.apply(hidden, weight, targets - first, group, temperature, chunk, with_entropy)  # type: ignore[no-any-return]


def chunk_size(configured: int | None, device: torch.device, columns: int) -> int:
    """Tokens whose logits exist at a time, where a process holds ``columns`` of the vocabulary."""
    return configured or max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 25) // max(1, columns))


def _chosen(targets: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose target stands in this rank's columns, and these columns."""
    rows = ((targets >= 0) & (targets < columns)).nonzero().squeeze(-1)
    return rows, targets[rows]


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        group: dist.ProcessGroup,
        temperature: float,
        size: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        count, columns = len(hidden), len(weight)
        # per token: Σ exp(z − m), Σ exp(z − m) · z, z of the target
        sums = torch.zeros(3, count, dtype=torch.float32, device=hidden.device)
        largest = torch.full((count,), -torch.inf, dtype=torch.float32, device=hidden.device)
        for start in range(0, count, size):
            part = slice(start, start + size)
            z = torch.nn.functional.linear(hidden[part], weight).float().div_(temperature)
            if columns:
                largest[part] = z.amax(-1)
            if dist.get_world_size(group) > 1:
                dist.all_reduce(largest[part], op=dist.ReduceOp.MAX, group=group)
            rows, chosen = _chosen(targets[part], columns)
            sums[2, part][rows] = z[rows, chosen]
            if with_entropy:
                weights = (z - largest[part, None]).exp_()
                sums[1, part] = torch.linalg.vecdot(weights, z)
            else:
                weights = z.sub_(largest[part, None]).exp_()
            sums[0, part] = weights.sum(-1)
        if dist.get_world_size(group) > 1:
            dist.all_reduce(sums, group=group)
        normaliser = sums[0].log().add_(largest)
        entropy = normaliser - sums[1] / sums[0] if with_entropy else None
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.settings = temperature, size
        return sums[2] - normaliser, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        grad_logprobs, grad_entropy = grads
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        temperature, size = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logp = torch.nn.functional.linear(hidden[part], weight).float().div_(temperature)
            logp.sub_(normaliser[part, None])
            if grad_entropy is None:
                assert grad_logprobs is not None
                grad = logp.exp_().mul_(-grad_logprobs[part, None])
            else:
                p = logp.exp()
                grad = logp.add_(entropy[part, None]).mul_(-grad_entropy[part, None])
                if grad_logprobs is not None:
                    grad.sub_(grad_logprobs[part, None])
                grad.mul_(p)
            if grad_logprobs is not None:
                rows, chosen = _chosen(targets[part], len(weight))
                grad[rows, chosen] += grad_logprobs[part][rows]
            grad = grad.div_(temperature).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if grad.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, hidden[part])
                else:
                    grad_weight += grad.T @ hidden[part]
        cast = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, cast, None, None, None, None, None
