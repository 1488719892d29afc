"""Divergences between the distributions of a student and a teacher over the next token.

A divergence is a sum over *buckets* of a function of two log-probs. Buckets are the tokens of the vocabulary, or the
teacher's k best tokens and one bucket for all others: a sum over the k tokens alone is no divergence, as it becomes
negative and does not notice what happens outside of them. The functions here return the summands, so that an engine
that holds a part of the vocabulary adds up its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field

from rlcore.algorithms.registries import divergences
from rlcore.config import Config
from rlcore.config.registry import NoParams

Terms = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(student log-probs [..., K], teacher log-probs [..., K]) → summands [..., K]``, differentiable in the first."""


@divergences.register("reverse-kl")
def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, params: NoParams) -> torch.Tensor:
    """KL(S ‖ T) = Σ s·(log s − log t): the student gives up what the teacher finds unlikely (mode seeking).

    Source: MiniLLM, Gu et al. 2023, arXiv:2306.08543.
    """
    return student.exp() * (student - teacher)


@divergences.register("forward-kl")
def forward_kl(student: torch.Tensor, teacher: torch.Tensor, params: NoParams) -> torch.Tensor:
    """KL(T ‖ S) = Σ t·(log t − log s): the student covers all that the teacher finds likely (mode covering).

    Source: Hinton et al. 2015, arXiv:1503.02531.
    """
    return teacher.exp() * (teacher - student)


class JSDParams(Config):
    """Parameters of ``jsd``."""

    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the teacher in the mixture M. 0 is KL(T ‖ S) and 1 is KL(S ‖ T), which are not the "
        "limits of the formula: that tends to 0 at both ends, and so does its gradient.",
    )


@divergences.register("jsd", params=JSDParams)
def jsd(student: torch.Tensor, teacher: torch.Tensor, params: JSDParams) -> torch.Tensor:
    """β·KL(T ‖ M) + (1 − β)·KL(S ‖ M), M = β·T + (1 − β)·S; at β = 0 KL(T ‖ S) and at β = 1 KL(S ‖ T).

    Source: generalised Jensen–Shannon divergence of GKD, Agarwal et al. 2023, arXiv:2306.13649.
    """
    beta = params.beta
    if beta == 0:
        return forward_kl(student, teacher, NoParams())
    if beta == 1:
        return reverse_kl(student, teacher, NoParams())
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)


def bucketed(top_logprobs: torch.Tensor) -> torch.Tensor:
    """Return log-probs ``[P, k]`` of distinct tokens and, as entry k, that of all others together: ``[P, k + 1]``.

    Where the k tokens have all the mass, up to fp32 rounding, the rest is that rounding, without gradient.
    """
    smallest = torch.finfo(top_logprobs.dtype).eps
    captured = top_logprobs.logsumexp(-1, keepdim=True)
    return torch.cat([top_logprobs, (-torch.expm1(captured)).clamp(min=smallest).log()], -1)
