"""Every policy loss against its formula in plain Python, and its gradient against central differences of that formula.

Where a formula stops gradients, the oracle takes the log-probs twice: as what is differentiated and as constants.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from rlcore.algorithms import PolicyLossInputs, policy_losses
from rlcore.metrics import Metrics

SETTINGS = [
    ("ppo", {}),
    ("ppo", {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": None}),
    ("ppo", {"dual_clip": 1.2}),
    ("cispo", {}),
    ("cispo", {"clip_low": 0.2, "clip_high": 0.1}),
    ("sapo", {}),
    ("sapo", {"tau_positive": 2.0, "tau_negative": 0.5}),
    ("gspo", {}),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.2}),
    ("gmpo", {}),
    ("gmpo", {"clip_low": 0.1, "clip_high": 0.2}),
    ("reinforce", {}),
    ("gpg", {}),
]
Rows = list[list[float]]


class Case:
    """Random sequences, among them an empty one, one without a trained token, and some with large ratios."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.lengths = [0, 3] + [rng.randint(1, 7) for _ in range(4)]
        self.mask: Rows = [[float(rng.random() < 0.7) for _ in range(n)] for n in self.lengths]
        self.mask[1] = [0.0, 0.0, 0.0]
        per_sequence = rng.random() < 0.5  # outcome rewards: one advantage per sequence
        shared = [rng.gauss(0, 1) for _ in self.lengths]
        self.advantages = self._rows(lambda i: shared[i] if per_sequence else rng.gauss(0, 1))
        self.old = self._rows(lambda i: -3 * rng.random())
        scale = rng.choice([0.05, 0.5, 2.0])
        self.logprobs = [[m * (o + rng.gauss(0, scale)) for m, o in zip(ms, os)] for ms, os in zip(self.mask, self.old)]

    def _rows(self, draw: Callable[[int], float]) -> Rows:
        return [[m * draw(i) for m in row] for i, row in enumerate(self.mask)]

    def inputs(self) -> PolicyLossInputs:
        def flat(rows: Rows) -> torch.Tensor:
            return torch.tensor([x for row in rows for x in row], dtype=torch.float64)

        return PolicyLossInputs(
            flat(self.logprobs).requires_grad_(),
            flat(self.old),
            flat(self.advantages),
            flat(self.mask),
            torch.tensor(self.lengths),
        )


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def oracle(name: str, params: dict, case: Case, logprobs: Rows, constant: Rows) -> Rows:
    """Per-token losses. ``constant`` has the values of ``logprobs`` wherever the formula stops the gradient."""
    losses: Rows = []
    for i, mask in enumerate(case.mask):
        trained = [t for t, m in enumerate(mask) if m]
        old, advantages = case.old[i], case.advantages[i]
        average = {
            key: sum(values[t] for t in trained) / max(len(trained), 1)
            for key, values in (
                ("difference", [x - o for x, o in zip(constant[i], old)]),
                ("advantage", advantages),
                ("bounded", [_gmpo_bound(x - o, a, params) for x, o, a in zip(logprobs[i], old, advantages)]),
            )
        }
        row = []
        for t, m in enumerate(mask):
            if not m:
                row.append(0.0)
                continue
            x, a = logprobs[i][t], advantages[t]
            ratio = math.exp(clip(x - old[t], -20, 20))
            frozen = math.exp(clip(constant[i][t] - old[t], -20, 20))
            if name == "ppo":
                low, high = params.get("clip_low", 0.2), params.get("clip_high", 0.2)
                loss = max(-a * ratio, -a * clip(ratio, 1 - low, 1 + high))
                cap = params.get("dual_clip", 3.0)
                if cap is not None and a < 0:
                    loss = min(loss, -a * cap)
            elif name == "cispo":
                weight = clip(frozen, 1 - params.get("clip_low", 1.0), 1 + params.get("clip_high", 4.0))
                loss = -weight * a * x
            elif name == "sapo":
                tau = params.get("tau_positive", 1.0) if a > 0 else params.get("tau_negative", 1.05)
                loss = -a * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
            elif name == "gspo":
                low, high = params.get("clip_low", 3e-4), params.get("clip_high", 4e-4)
                s = math.exp(min(average["difference"] + x - constant[i][t], 10.0))
                loss = max(-a * s, -a * clip(s, 1 - low, 1 + high))
            elif name == "gmpo":
                loss = -average["advantage"] * math.exp(average["bounded"])
            else:
                loss = -x * a
            row.append(loss)
        losses.append(row)
    return losses


def _gmpo_bound(difference: float, advantage: float, params: dict) -> float:
    clipped = clip(difference, -params.get("clip_low", 0.4), params.get("clip_high", 0.4))
    if advantage == 0:
        return 0.0
    return min(difference, clipped) if advantage > 0 else max(difference, clipped)


def evaluate(name: str, params: dict, inputs: PolicyLossInputs) -> tuple[torch.Tensor, Metrics]:
    entry = policy_losses.get(name)
    return entry.function(inputs, entry.params(**params))


@pytest.mark.parametrize(("name", "params"), SETTINGS)
@pytest.mark.parametrize("seed", range(12))
def test_losses_equal_the_formula(name: str, params: dict, seed: int) -> None:
    case = Case(seed)
    losses, _ = evaluate(name, params, case.inputs())
    expected = [x for row in oracle(name, params, case, case.logprobs, case.logprobs) for x in row]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "params"), SETTINGS)
@pytest.mark.parametrize("seed", range(6))
def test_gradients_equal_central_differences(name: str, params: dict, seed: int) -> None:
    case, step = Case(seed), 1e-6
    weights = [[random.Random(f"{seed} {i} {t}").random() for t in range(n)] for i, n in enumerate(case.lengths)]
    inputs = case.inputs()
    losses, _ = evaluate(name, params, inputs)
    (losses * torch.tensor([w for row in weights for w in row], dtype=torch.float64)).sum().backward()

    def total(logprobs: Rows) -> float:
        rows = oracle(name, params, case, logprobs, case.logprobs)
        return sum(w * x for ws, xs in zip(weights, rows) for w, x in zip(ws, xs))

    expected = []
    for i, n in enumerate(case.lengths):
        for t in range(n):
            up, down = ([list(row) for row in case.logprobs] for _ in range(2))
            up[i][t] += step * case.mask[i][t]
            down[i][t] -= step * case.mask[i][t]
            expected.append((total(up) - total(down)) / (2 * step))
    assert inputs.logprobs.grad is not None
    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_gspo_gradient_is_that_of_the_sequence_ratio() -> None:
    """With one advantage per sequence and equal token weights, GSPO-token is GSPO: −A·exp(mean d), differentiated."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 4])
    logprobs = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    old = logprobs.detach() + 1e-5 * torch.randn(7, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.5], dtype=torch.float64)
    mask = torch.ones(7, dtype=torch.float64)
    losses, _ = evaluate(
        "gspo", {}, PolicyLossInputs(logprobs, old, advantages.repeat_interleave(lengths), mask, lengths)
    )
    actual = torch.autograd.grad(sum(part.mean() for part in losses.split([3, 4])), logprobs)[0]
    sequence = [-a * d.mean().exp() for a, d in zip(advantages, (logprobs - old).split([3, 4]))]
    expected = torch.autograd.grad(sum(sequence), logprobs)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "params"), SETTINGS)
def test_on_policy_gradient_is_the_policy_gradient(name: str, params: dict) -> None:
    """At π = π_old every loss has the gradient −A of the plain one, up to GMPO's 1/length per sequence."""
    case = Case(3)
    case.old = [list(row) for row in case.logprobs]
    inputs = case.inputs()
    losses, _ = evaluate(name, params, inputs)
    losses.sum().backward()
    expected = -inputs.advantages
    if name == "gmpo":
        expected = torch.tensor(
            [-m * sum(a) / max(sum(row), 1) for row, a in zip(case.mask, case.advantages) for m in row],
            dtype=torch.float64,
        )
    assert inputs.logprobs.grad is not None
    torch.testing.assert_close(inputs.logprobs.grad, expected, rtol=1e-12, atol=1e-12)


def test_clip_fractions_and_kl_by_hand() -> None:
    ratios = [1.5, 0.5, 1.5, 0.5, 9.0, 1.1, 7.0]
    advantages = [1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 5.0]
    mask = torch.tensor([1.0, 1, 1, 1, 1, 1, 0], dtype=torch.float64)
    logprobs = torch.tensor(ratios, dtype=torch.float64).log() * mask
    inputs = PolicyLossInputs(
        logprobs,
        torch.zeros_like(logprobs),
        torch.tensor(advantages, dtype=torch.float64) * mask,
        mask,
        torch.tensor([4, 3]),
    )
    metrics = evaluate("ppo", {}, inputs)[1].to_dict()
    assert metrics["pg_clipfrac"] == pytest.approx(2 / 6)  # too high and good; too low and bad
    assert metrics["pg_clipfrac_lower"] == pytest.approx(1 / 6)  # ratio 9 > 3 and bad
    assert metrics["ppo_kl"] == pytest.approx(-sum(map(math.log, ratios[:6])) / 6)
    assert evaluate("cispo", {}, inputs)[1].to_dict()["pg_clipfrac"] == pytest.approx(1 / 6)
    gmpo = evaluate("gmpo", {}, inputs)[1].to_dict()
    assert gmpo["pg_clipfrac"] == pytest.approx(2 / 6)  # |log ratio| > 0.4 with A > 0: 1.5, 0.5
    assert gmpo["pg_clipfrac_lower"] == pytest.approx(3 / 6)  # and with A < 0: 1.5, 0.5, 9


@pytest.mark.parametrize(("name", "params"), SETTINGS)
def test_extreme_ratios_stay_finite(name: str, params: dict) -> None:
    logprobs = torch.tensor([-1e-3, -80.0, -1e-3, -80.0], requires_grad=True)
    old = torch.tensor([-80.0, -1e-3, -80.0, -1e-3])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    inputs = PolicyLossInputs(logprobs, old, advantages, torch.ones(4), torch.tensor([1, 1, 1, 1]))
    losses, metrics = evaluate(name, params, inputs)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert all(math.isfinite(value) for value in metrics.to_dict().values())
