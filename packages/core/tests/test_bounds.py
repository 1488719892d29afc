"""What is clamped keeps a gradient of the right sign and of bounded size, unless a method stops it by design."""

from __future__ import annotations

import math

import pytest
import torch

from rlcore.algorithms import PolicyLossInputs, corrections, kl_estimators, policy_losses
from rlcore.algorithms.off_policy import mismatch_metrics
from rlcore.config.registry import NoParams

# distances of a log-prob from the old or the reference's one, on either side of every bound
FAR = [0.3, 2.5, 2.7, 9.0, 11.5, 19.0, 21.0, 60.0, 1e4]
DISTANCES = [-far for far in FAR] + FAR


def kl(name: str, distance: float, dtype: torch.dtype) -> tuple[float, float]:
    """Value and gradient where logπ − logπ_ref is ``distance``."""
    logprobs = torch.tensor([distance], dtype=dtype, requires_grad=True)
    value = kl_estimators.get(name).function(logprobs, torch.zeros(1, dtype=dtype), NoParams())
    value.sum().backward()
    assert logprobs.grad is not None
    return float(value.detach()), float(logprobs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "steepest"), [("abs", 1.0), ("k3", math.exp(2.611) - 1), ("k2", math.inf), ("k1+", math.inf)]
)
def test_a_kl_loss_pulls_back_from_every_distance(name: str, steepest: float, dtype: torch.dtype) -> None:
    for distance in DISTANCES:
        value, gradient = kl(name, distance, dtype)
        assert math.isfinite(value), distance
        assert gradient * distance > 0, distance
        assert abs(gradient) <= steepest, distance


def test_k3_is_its_formula_up_to_its_limit_and_keeps_the_slope_beyond() -> None:
    for distance in DISTANCES:
        value, gradient = kl("k3", distance, torch.float64)
        x = min(-distance, 700.0)
        assert value == pytest.approx(min(math.exp(x) - x - 1, 10.0), rel=1e-12)
        assert gradient == pytest.approx(1 - math.exp(min(max(x, -20.0), 2.6109)), rel=1e-9)


def test_k3_of_close_log_probs_is_not_negative() -> None:
    """eˣ − x − 1 of float32 is noise where x² is below its precision; half of it was negative."""
    logprobs = -3 * torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for scale in (1e-7, 1e-5, 1e-4, 1e-3):
        noise = scale * torch.randn(1000, generator=torch.Generator().manual_seed(1))
        x = (logprobs + noise - logprobs).double()
        exact = (x.expm1() - x).mean()
        value = kl_estimators.get("k3").function(logprobs, logprobs + noise, NoParams())
        assert float(value.min()) >= 0
        torch.testing.assert_close(value.double().mean(), exact, rtol=1e-2, atol=2e-15)
        measured = mismatch_metrics(logprobs, logprobs + noise, torch.ones(1000)).to_dict()["rollout_kl_k3"]
        assert measured == pytest.approx(float(exact), rel=1e-2, abs=2e-15)


# Where the method itself stops the gradient: (advantage, on which side of π_old).
RATIO_CLIPS = {(1, 1), (-1, -1)}
BY_DESIGN: dict[str, set[tuple[int, int]]] = {"ppo": RATIO_CLIPS, "gspo": RATIO_CLIPS, "gmpo": RATIO_CLIPS}
LOSSES = [
    ("ppo", {"dual_clip": None}, math.exp(20)),
    ("gspo", {}, math.exp(10)),
    ("gmpo", {}, math.exp(20)),
    ("cispo", {"clip_low": 0.8}, 5.0),
    ("reinforce", {}, 1.0),
    ("gpg", {}, 1.0),
]


@pytest.mark.parametrize(("name", "params", "steepest"), LOSSES)
@pytest.mark.parametrize("advantage", [1, -1])
def test_a_policy_loss_pulls_back_from_every_distance(
    name: str, params: dict[str, float], steepest: float, advantage: int
) -> None:
    entry = policy_losses.get(name)
    for distance in DISTANCES:
        logprobs = torch.tensor([distance], dtype=torch.float64, requires_grad=True)
        columns = (torch.zeros(1).double(), torch.tensor([float(advantage)]).double(), torch.ones(1).double())
        losses, _ = entry.function(PolicyLossInputs(logprobs, *columns, torch.tensor([1])), entry.params(**params))
        losses.sum().backward()
        assert logprobs.grad is not None
        gradient, side = float(logprobs.grad), int(math.copysign(1, distance))
        if (advantage, side) in BY_DESIGN.get(name, set()):
            assert gradient == 0 or abs(distance) <= params.get("clip_high", 0.4), distance
        elif name != "gspo" or distance > -700:  # whose ratio is 0 there
            assert gradient * advantage < 0, distance
        assert abs(gradient) <= steepest * (1 + 1e-9), distance


def test_dual_clip_and_sapo_stop_where_their_papers_do() -> None:
    for name, distance in (("ppo", 1.2), ("ppo", 30.0), ("sapo", 5.0)):
        entry = policy_losses.get(name)
        logprobs = torch.tensor([distance], dtype=torch.float64, requires_grad=True)
        columns = (torch.zeros(1).double(), -torch.ones(1).double(), torch.ones(1).double())
        losses, _ = entry.function(PolicyLossInputs(logprobs, *columns, torch.tensor([1])), entry.params())
        losses.sum().backward()
        assert logprobs.grad is not None
        assert float(logprobs.grad.abs()) < 1e-12


@pytest.mark.parametrize("name", [entry.name for entry in corrections])
def test_corrections_are_finite_and_carry_no_gradient(name: str) -> None:
    entry = corrections.get(name)
    old = torch.tensor(DISTANCES, dtype=torch.float64, requires_grad=True)
    count = len(DISTANCES)
    weights, metrics = entry.function(
        torch.zeros(count).double(), old, torch.ones(count), torch.tensor([count]), entry.params()
    )
    assert not weights.requires_grad
    assert weights.isfinite().all()
    assert all(math.isfinite(value) for value in metrics.to_dict().values())
