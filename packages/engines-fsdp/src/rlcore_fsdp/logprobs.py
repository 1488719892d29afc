"""Log-probs and entropies of a language-model head, without ever holding the logits of all tokens.

The vocabulary projection runs over chunks of tokens, forward and backward; only the log-normaliser and the entropy of
each token are kept in between, and the backward pass computes the logits again. With ``z`` the processed logits,
``p = softmax(z)``, ``lse = log Σ exp z`` and ``H = lse − Σ p z``:

    ∂ log p_y / ∂z = 1_y − p        ∂H / ∂z = −p · (log p + H)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# Elements of one chunk of logits where the number of tokens is not configured: 128 MiB (CPU), 1 GiB (CUDA) in fp32.
_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}


@dataclass(frozen=True)
class LogitsRule:
    """What the architecture does between the projection and the softmax: ``cap · tanh(scale · x / cap)``."""

    scale: float = 1.0
    cap: float | None = None


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of each target and entropy of each distribution, both ``[P]`` fp32 with gradient.

    Args:
        hidden: ``[P, hidden]``.
        weight: ``[vocab, hidden]``; ``bias``: ``[vocab]`` or None.
        targets: ``[P]`` int64.
        temperature: divides the logits; positive.
        chunk: tokens per chunk; None bounds the chunk's memory.
        with_entropy: False saves two passes over the logits and returns None for the entropy.
    """
    size = chunk_size(chunk, hidden.device, len(weight))
    return _Head.apply(hidden, weight, bias, targets, temperature, rule, size, with_entropy)  # type: ignore[no-any-return]


def chunk_size(configured: int | None, device: torch.device, vocabulary: int) -> int:
    """Tokens whose logits exist at a time."""
    return configured or max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 25) // vocabulary)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, rule: LogitsRule
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """fp32 logits over temperature ``[C, vocab]``, and ``tanh`` of the soft cap if there is one."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if rule.cap is None:
        factor = rule.scale / temperature
        return (logits.mul_(factor) if factor != 1 else logits), None
    squashed = logits.mul_(rule.scale / rule.cap).tanh_()
    return squashed * (rule.cap / temperature), squashed


class _Head(torch.autograd.Function):
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        logprobs, normaliser = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        entropy = torch.empty_like(logprobs) if with_entropy else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            z, _ = _logits(hidden[rows], weight, bias, temperature, rule)
            if entropy is None:
                lse = torch.logsumexp(z, -1)
            else:
                largest = z.amax(-1, keepdim=True)
                weights = (z - largest).exp_()
                total = weights.sum(-1)
                lse = total.log() + largest.squeeze(-1)
                entropy[rows] = lse - torch.linalg.vecdot(weights, z) / total
            normaliser[rows] = lse
            logprobs[rows] = z.gather(-1, targets[rows, None]).squeeze(-1) - lse
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.settings = temperature, rule, size
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        grad_logprobs, grad_entropy = grads
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        temperature, rule, size = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            z, squashed = _logits(hidden[rows], weight, bias, temperature, rule)
            logp = z.sub_(normaliser[rows, None])
            p = logp.exp_() if grad_entropy is None else logp.exp()
            if grad_entropy is None:
                grad = p.neg_().mul_(grad_logprobs[rows, None])
            else:
                grad = logp.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None])
                if grad_logprobs is not None:
                    grad.sub_(grad_logprobs[rows, None])
                grad.mul_(p)
            if grad_logprobs is not None:
                grad.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
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
        cast = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, cast, None if grad_bias is None else grad_bias.to(bias.dtype), None, None, None, None, None
