"""The contracts of estimators and losses, checked by the kit (``pip install './my_task[test]'``), and the values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from my_task.algorithms import FocalParams, focal, group_mean
from rlcore.algorithms import PolicyLossInputs
from rlcore.batch import Batch
from rlcore_kit.testing.algorithms import AdvantageConformance, PolicyLossConformance


class TestMeanDeviation(AdvantageConformance):
    name = "mean_deviation"


class TestFocal(PolicyLossConformance):
    name = "focal"

    def batch(self, seed: int) -> Batch:
        batch = super().batch(seed)
        return batch.with_columns(solve_rate=torch.linspace(0, 1, len(batch)))


def test_a_policy_learns_with_the_estimator(learns: Callable[..., Any]) -> None:
    """The fixture comes with rlcore."""
    learns("grpo-letters", "algorithm.advantage=mean_deviation")


def test_the_solve_rate_is_that_of_the_group() -> None:
    right, group = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([7, 3, 7, 7])
    assert group_mean(right, group).tolist() == pytest.approx([2 / 3, 0, 2 / 3, 2 / 3])


def test_easy_prompts_weigh_less() -> None:
    half, ones = torch.full((2,), math.log(0.5)), torch.ones(2)
    columns = {"solve_rate": torch.tensor([0.0, 0.5])}
    losses, _ = focal(PolicyLossInputs(half, half, ones, ones, torch.tensor([1, 1]), columns), FocalParams(gamma=2))
    assert losses.tolist() == pytest.approx([math.log(2), math.log(2) / 4])
