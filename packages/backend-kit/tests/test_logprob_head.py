"""The log-prob head compared with a full log-softmax in fp64: values, gradients, allocations; on several ranks too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlcore_kit.testing.processes import RankPool
from rlcore_kit.training.logprob_head import LogitsRule, VocabularyShard, logprobs_and_entropy

TOKENS, HIDDEN, VOCABULARY = 23, 8, 31


def inputs(
    dtype: torch.dtype, biased: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,))
    )
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, bias if biased else None, targets


def full_softmax(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    rule: LogitsRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias) * rule.scale
    if rule.cap is not None:
        logits = rule.cap * torch.tanh(logits / rule.cap)
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(targets)), targets], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS, None])
@pytest.mark.parametrize(
    ("temperature", "rule", "biased"),
    [(1.0, LogitsRule(), False), (0.6, LogitsRule(scale=0.3), True), (1.4, LogitsRule(cap=2.0, scale=1.5), True)],
)
def test_values_and_gradients_equal_the_full_softmax(
    chunk: int | None, temperature: float, rule: LogitsRule, biased: bool
) -> None:
    given = list(inputs(torch.float32, biased))
    hidden, weight, bias, targets = given
    logprobs, entropy = logprobs_and_entropy(
        hidden, weight, bias, targets, temperature=temperature, rule=rule, chunk=chunk
    )
    assert entropy is not None
    exact = [t if t is None or not t.requires_grad else t.detach().double().requires_grad_() for t in given]
    expected_logprobs, expected_entropy = full_softmax(*exact, temperature, rule)  # type: ignore[arg-type]
    torch.testing.assert_close(logprobs.double(), expected_logprobs, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=2e-6, rtol=2e-6)
    along = torch.linspace(-1, 2, TOKENS)
    (logprobs * along + 0.3 * entropy * along.flip(0)).sum().backward()
    (expected_logprobs * along + 0.3 * expected_entropy * along.flip(0)).sum().backward()
    for ours, theirs in zip(given[:3], exact[:3]):
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_one_output_has_a_gradient_without_the_other(used: str) -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    outputs = dict(zip(("logprobs", "entropy"), logprobs_and_entropy(hidden, weight, None, targets, chunk=5)))
    outputs[used].sum().backward()
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = dict(zip(("logprobs", "entropy"), full_softmax(exact[0], exact[1], None, targets, 1.0, LogitsRule())))
    expected[used].sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact[0].grad, atol=1e-5, rtol=3e-6)
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, atol=1e-5, rtol=3e-6)


def test_entropy_is_none_where_it_is_not_requested() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    with_it, _ = logprobs_and_entropy(hidden, weight, None, targets)
    logprobs, entropy = logprobs_and_entropy(hidden, weight, None, targets, with_entropy=False)
    assert entropy is None
    torch.testing.assert_close(logprobs, with_it, atol=1e-6, rtol=0)


def test_large_logits_stay_finite() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    logprobs, entropy = logprobs_and_entropy(hidden, weight, None, targets, temperature=1e-4)
    (logprobs + entropy).sum().backward()
    for tensor in (logprobs, entropy, hidden.grad, weight.grad):
        assert torch.isfinite(tensor).all()


def test_bf16_inputs_are_summed_in_fp32() -> None:
    """Logits are rounded to 8 bits (0.4 %), sums over the vocabulary and over tokens are not."""
    hidden, weight, _, targets = inputs(torch.bfloat16)
    logprobs, entropy = logprobs_and_entropy(hidden, weight, None, targets, chunk=2)
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected_logprobs, expected_entropy = full_softmax(exact[0], exact[1], None, targets, 1.0, LogitsRule())
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected_logprobs, atol=5e-2, rtol=0)
    (logprobs + entropy).sum().backward()
    (expected_logprobs + expected_entropy).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.double(), exact[1].grad, atol=5e-2, rtol=2e-2)


def test_logits_of_all_tokens_never_exist(largest: Any) -> None:
    tokens, hidden_size, vocabulary, chunk = 400, 4, 300, 10
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    with largest:
        logprobs, entropy = logprobs_and_entropy(hidden, weight, None, targets, chunk=chunk)
        (logprobs + entropy).sum().backward()
    assert largest.elements == chunk * vocabulary, "the logits of one chunk are the largest tensor there is"


def test_an_empty_input_has_zero_gradients() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    logprobs, entropy = logprobs_and_entropy(hidden[:0], weight, None, targets[:0])
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def on_every_rank(rows_per_rank: int, chunk: int | None, with_entropy: bool) -> dict[str, Any]:
    """Compute with this rank's part of the vocabulary, which is empty on the last rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    hidden, weight, bias, targets = inputs(torch.float32, biased=True)
    assert bias is not None
    first = dist.get_rank() * rows_per_rank
    own, own_bias = (x.detach()[first : first + rows_per_rank].clone().requires_grad_() for x in (weight, bias))
    assert dist.group.WORLD is not None
    logprobs, entropy = logprobs_and_entropy(
        hidden,
        own,
        own_bias,
        targets,
        temperature=0.7,
        rule=LogitsRule(cap=2.0),
        chunk=chunk,
        with_entropy=with_entropy,
        shard=VocabularyShard(first, rows_per_rank, dist.group.WORLD),
    )
    along = torch.linspace(-1, 2, TOKENS)
    loss = (logprobs * along).sum()
    if entropy is not None:
        loss = loss + 0.3 * (entropy * along.flip(0)).sum()
    loss.backward()
    dist.all_reduce(hidden.grad)
    return {
        "logprobs": logprobs.detach(),
        "entropy": None if entropy is None else entropy.detach(),
        "hidden": hidden.grad,
        "weight": own.grad,
        "bias": own_bias.grad,
    }


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_a_divided_vocabulary_equals_the_full_one(ranks: RankPool, chunk: int | None, with_entropy: bool) -> None:
    exact = [
        tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in inputs(torch.float32, True)
    ]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in exact[:3])
    logprobs, entropy = full_softmax(hidden, weight, bias, exact[3], 0.7, LogitsRule(cap=2.0))
    along = torch.linspace(-1, 2, TOKENS)
    loss = (logprobs * along).sum() + (0.3 * (entropy * along.flip(0)).sum() if with_entropy else 0.0)
    loss.backward()
    results = ranks.run(on_every_rank, 16, chunk, with_entropy, timeout=300)
    close = {"atol": 3e-6, "rtol": 1e-5, "check_dtype": False}
    for result in results:
        torch.testing.assert_close(result["logprobs"], logprobs.detach(), **close)
        torch.testing.assert_close(result["hidden"], hidden.grad, **close)
        if with_entropy:
            torch.testing.assert_close(result["entropy"], entropy.detach(), **close)
        else:
            assert result["entropy"] is None
    for name, expected in (("weight", weight.grad), ("bias", bias.grad)):
        torch.testing.assert_close(torch.cat([result[name] for result in results]), expected, **close)
