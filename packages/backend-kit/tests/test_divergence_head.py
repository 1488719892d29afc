"""Two heads compared over the whole vocabulary, against fp64: values, gradients, allocations; on several ranks too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlcore.algorithms.registries import divergences
from rlcore.config import Algorithm
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.training.divergence_head import FrozenHead, divergence, top_logprobs
from rlcore_kit.training.logprob_head import LogitsRule, VocabularyShard

TOKENS, HIDDEN, OTHER_HIDDEN, VOCABULARY = 23, 8, 6, 31
RULE, OTHER_RULE = LogitsRule(cap=4.0, scale=1.5), LogitsRule(scale=0.6)


def terms(kind: str) -> Algorithm:
    entry = divergences.get(kind)
    return Algorithm(entry, entry.params())


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], FrozenHead]:
    """Return hidden states, weight and bias of the model, the other model's hidden states, and its head."""
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,), (TOKENS, OTHER_HIDDEN), (VOCABULARY, OTHER_HIDDEN)
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return made[:4], FrozenHead(made[4], rule=OTHER_RULE)


def exact(own: list[torch.Tensor], other: FrozenHead, kind: str, temperature: float) -> torch.Tensor:
    hidden, weight, bias, other_hidden = own
    logits = RULE.cap * torch.tanh(RULE.scale / RULE.cap * torch.nn.functional.linear(hidden, weight, bias))
    theirs = OTHER_RULE.scale * other_hidden @ other.weight.T
    return terms(kind)((logits / temperature).log_softmax(-1), (theirs / temperature).log_softmax(-1)).sum(-1)


def backpropagated(kind: str, chunk: int | None = 12) -> tuple[torch.Tensor, list[torch.Tensor]]:
    own, other = inputs()
    leaves = [tensor.requires_grad_() for tensor in own[:3]]
    found = divergence(*leaves, own[3], other, terms(kind), temperature=0.7, rule=RULE, chunk=chunk)
    (found * torch.linspace(-1, 2, TOKENS)).sum().backward()
    return found.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def expected(kind: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    own, other = inputs()
    doubles = [tensor.double().requires_grad_() for tensor in own]
    found = exact(doubles, FrozenHead(other.weight.double()), kind, 0.7)
    (found * torch.linspace(-1, 2, TOKENS)).sum().backward()
    return found.detach(), [tensor.grad for tensor in doubles[:3] if tensor.grad is not None]


@pytest.mark.parametrize("kind", ["reverse-kl", "forward-kl", "jsd"])
@pytest.mark.parametrize("chunk", [1, 12, None])
def test_values_and_gradients_are_those_of_full_distributions(kind: str, chunk: int | None) -> None:
    values, gradients = backpropagated(kind, chunk)
    exact_values, exact_gradients = expected(kind)
    torch.testing.assert_close(values.double(), exact_values, atol=3e-6, rtol=3e-6)
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=5e-6, rtol=5e-6)


def test_neither_models_logits_exist_for_all_tokens(largest: Any) -> None:
    tokens, vocabulary, chunk = 400, 300, 60
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (tokens, vocabulary))
    other = FrozenHead(torch.randn(vocabulary, 4, generator=generator))
    with largest:
        divergence(hidden, weight, None, hidden.detach(), other, terms("jsd"), chunk=chunk).sum().backward()
        top_logprobs(hidden.detach(), weight.detach(), None, 3, chunk=chunk // 6)
    assert largest.elements == chunk // 6 * vocabulary


@pytest.mark.parametrize("kind", ["reverse-kl", "jsd"])
def test_bf16_models_that_nearly_agree_have_an_exact_gradient(kind: str) -> None:
    """Logits rounded to bf16 would differ by more than the models do."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=generator).bfloat16()
    other = FrozenHead((weight.float() + 0.02 * torch.randn(64, 16, generator=generator)).bfloat16())
    states = (2 * torch.randn(50, 16, generator=generator)).bfloat16()
    hidden = states.clone().requires_grad_()
    divergence(hidden, weight, None, states, other, terms(kind)).sum().backward()
    doubled = states.double().requires_grad_()
    own, theirs = ((doubled if w is weight else states.double()) @ w.double().T for w in (weight, other.weight))
    terms(kind)(own.log_softmax(-1), theirs.log_softmax(-1)).sum().backward()
    assert hidden.grad is not None
    assert doubled.grad is not None
    assert (hidden.grad.double() - doubled.grad).norm() < 5e-3 * doubled.grad.norm()


def on_every_rank(rows_per_rank: int, kind: str) -> dict[str, Any]:
    """Compute with this rank's part of the vocabulary, which is empty on the last rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    (hidden, weight, bias, other_hidden), other = inputs()
    first = dist.get_rank() * rows_per_rank
    mine = slice(first, first + rows_per_rank)
    shard = VocabularyShard(first, rows_per_rank, dist.group.WORLD)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight[mine].clone(), bias[mine].clone())]
    part = FrozenHead(other.weight[mine], rule=OTHER_RULE)
    arguments: dict[str, Any] = {"temperature": 0.7, "rule": RULE, "shard": shard}
    values = divergence(*leaves, other_hidden, part, terms(kind), chunk=18, **arguments)
    (values * torch.linspace(-1, 2, TOKENS)).sum().backward()
    dist.all_reduce(hidden.grad)
    ids, best = top_logprobs(*(leaf.detach() for leaf in leaves), 20, **arguments)
    return {"values": values.detach(), "grads": [leaf.grad for leaf in leaves], "ids": ids, "best": best}


@pytest.mark.parametrize("kind", ["reverse-kl", "forward-kl", "jsd"])
def test_a_divided_vocabulary_equals_the_full_one(ranks: RankPool, kind: str) -> None:
    values, gradients = expected(kind)
    (hidden, weight, bias, _), _ = inputs()
    ids, best = top_logprobs(hidden, weight, bias, 20, temperature=0.7, rule=RULE)
    results = ranks.run(on_every_rank, 16, kind, timeout=300)
    close = {"atol": 5e-6, "rtol": 1e-5, "check_dtype": False}
    for result in results:
        torch.testing.assert_close(result["values"], values, **close)
        torch.testing.assert_close(result["grads"][0], gradients[0], **close)
        torch.testing.assert_close(result["best"], best, **close)
        assert torch.equal(result["ids"], ids)
    for place in (1, 2):
        torch.testing.assert_close(torch.cat([r["grads"][place] for r in results]), gradients[place], **close)
