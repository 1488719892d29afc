"""KL estimators against their formulas and exact expectations, the reward penalty, and its controllers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from pydantic import ValidationError

from rlcore.algorithms import kl_estimators
from rlcore.algorithms.kl import AdaptiveKL, FixedKL, KLPenaltySettings, apply_kl_penalty, kl_controller
from rlcore.batch import Batch, Jagged
from rlcore.config.registry import NoParams


def estimate(name: str, logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    return kl_estimators.get(name).function(logprobs, ref_logprobs, NoParams())


def k3(x: float, ref: float) -> float:
    d = min(max(ref - x, -20), 20)
    return min(max(math.exp(d) - d - 1, -10), 10)


FORMULAS = {
    "k1": lambda x, ref: x - ref,
    "abs": lambda x, ref: abs(x - ref),
    "k2": lambda x, ref: 0.5 * (x - ref) ** 2,
    "k3": k3,
    "k1+": lambda x, ref: x - ref,
    "k3+": k3,
}


def test_every_estimator_has_an_oracle() -> None:
    assert {entry.name for entry in kl_estimators} >= set(FORMULAS)


@pytest.mark.parametrize("name", FORMULAS)
def test_values(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = -5 * torch.rand(2, 50, generator=generator, dtype=torch.float64)
    ref[0] += 100  # clamped
    ref[1] -= 100
    expected = [FORMULAS[name](x, r) for x, r in zip(logprobs.tolist(), ref.tolist())]
    actual = estimate(name, logprobs, ref)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["k1", "abs", "k2", "k3"])
def test_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs, ref = -torch.rand(2, 20, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: estimate(name, x, ref), (logprobs.requires_grad_(),))


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits, ref_logits = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref_logits


@pytest.mark.parametrize("name", ["k1", "k3", "k1+", "k3+"])
def test_expected_value_is_the_kl(name: str) -> None:
    logits, ref_logits = distributions()
    logprobs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    torch.testing.assert_close((logprobs.exp() * estimate(name, logprobs, ref)).sum(), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "unbiased"), [("k2", True), ("k1+", True), ("k3+", True), ("k1", False), ("k3", False)]
)
def test_which_losses_have_the_gradient_of_the_kl(name: str, unbiased: bool) -> None:
    """On-policy samples: the expectation is taken with probabilities that carry no gradient."""
    logits, ref_logits = distributions()
    logprobs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    exact = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)[0]
    loss = (logprobs.detach().exp() * estimate(name, logprobs, ref)).sum()
    actual = torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(actual, exact, rtol=1e-10, atol=1e-10) == unbiased


def penalty_batch(seed: int) -> Batch:
    rng = random.Random(seed)
    lengths = torch.tensor([3, 0, 5, 2])
    total = int(lengths.sum())

    def column(scale: float) -> Jagged:
        return Jagged(torch.tensor([scale * rng.gauss(0, 1) for _ in range(total)], dtype=torch.float64), lengths)

    return Batch(
        {
            "loss_mask": Jagged(torch.tensor([float(rng.random() < 0.6) for _ in range(total)]), lengths),
            "token_rewards": column(1),
            "old_logprobs": column(0.5),
            "ref_logprobs": column(0.5),
        }
    )


@pytest.mark.parametrize("seed", range(5))
def test_penalty_in_the_reward(seed: int) -> None:
    batch = penalty_batch(seed)
    settings = KLPenaltySettings(coeff=0.3, estimator="k3")
    shaped, metrics = apply_kl_penalty(batch, settings.estimator, kl_controller(settings))
    expected, means = [], []
    for row in batch.rows():
        penalties = []
        for t, reward in enumerate(row["token_rewards"].tolist()):
            kl = k3(float(row["old_logprobs"][t]), float(row["ref_logprobs"][t]))
            trained = t > 0 and bool(row["loss_mask"][t])
            expected.append(reward - 0.3 * kl * trained)
            penalties += [kl] * trained
        means.append(sum(penalties) / max(len(penalties), 1))
    torch.testing.assert_close(
        shaped.flat("token_rewards"), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    assert metrics.to_dict() == pytest.approx(
        {"reward_kl_penalty": sum(means) / len(means), "reward_kl_penalty_coeff": 0.3}
    )


def test_adaptive_controller() -> None:
    controller = AdaptiveKL(0.1, target=2.0, horizon=100)
    controller.update(2.2, samples=10)  # +10 % too high
    assert controller.coeff == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    before = controller.coeff
    controller.update(200.0, samples=10)  # clipped to +20 %
    assert controller.coeff == pytest.approx(before * (1 + 0.2 * 10 / 100))
    before = controller.coeff
    controller.update(0.0, samples=50)  # clipped to −20 %
    assert controller.coeff == pytest.approx(before * (1 - 0.2 * 50 / 100))


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_changes_nothing(kl: float) -> None:
    controller = AdaptiveKL(0.1, target=2.0, horizon=100)
    controller.update(kl, samples=10)
    assert controller.coeff == 0.1
    controller.update(2.2, samples=10)
    assert controller.coeff == pytest.approx(0.1 * 1.01)


def test_a_batch_larger_than_the_horizon_neither_flips_nor_explodes_the_coefficient() -> None:
    controller = AdaptiveKL(0.1, target=2.0, horizon=100)
    controller.update(0.0, samples=1000)
    assert controller.coeff == pytest.approx(0.1 * 0.8)
    controller.update(1e9, samples=100_000)
    assert controller.coeff == pytest.approx(0.1 * 0.8 * 1.2)


def test_a_coefficient_that_cannot_adapt_is_refused() -> None:
    assert KLPenaltySettings(coeff=0).coeff == 0
    with pytest.raises(ValidationError, match=r"would stay 0, .* target=0.1"):
        KLPenaltySettings(coeff=0, target=0.1)


def test_penalty_uses_the_coefficient_before_it_adapts() -> None:
    settings = KLPenaltySettings(coeff=0.5, target=1e-6, horizon=4)
    controller = kl_controller(settings)
    _, metrics = apply_kl_penalty(penalty_batch(0), KLPenaltySettings(estimator="k2").estimator, controller)
    assert metrics.to_dict()["reward_kl_penalty_coeff"] == 0.5
    assert controller.coeff == pytest.approx(0.5 * 1.2)


def test_controller_state_survives() -> None:
    settings = KLPenaltySettings(coeff=0.1, target=1.0, horizon=10)
    controller = kl_controller(settings)
    controller.update(5.0, samples=10)
    restored = kl_controller(settings)
    restored.load_state_dict(controller.state_dict())
    controller.update(0.3, samples=7)
    restored.update(0.3, samples=7)
    assert restored.coeff == controller.coeff
    fixed = FixedKL(0.1)
    fixed.update(5.0, samples=10)
    assert fixed.coeff == 0.1


def test_k3_as_a_loss_has_the_gradient_of_the_other_kl() -> None:
    logits, ref_logits = distributions()
    logprobs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    other = torch.autograd.grad((ref.exp() * (ref - logprobs)).sum(), logits, retain_graph=True)[0]
    actual = torch.autograd.grad((logprobs.detach().exp() * estimate("k3", logprobs, ref)).sum(), logits)[0]
    torch.testing.assert_close(actual, other, rtol=1e-10, atol=1e-10)
