"""What is said of samples that the policy gradient does not train on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore_recipes.settings import ActorSettings, AlgorithmSettings
from rlcore_recipes.step.advantages import GRADIENTLESS, SINGLE, advantages, warn_of_gradientless


def batch() -> Batch:
    """Two samples that differ, two that do not, one alone; of 1, 2, 3, 4 and 5 trained tokens."""
    lengths = torch.arange(2, 7)
    mask = [[0.0] + [1.0] * trained for trained in range(1, 6)]
    return Batch(
        {
            "loss_mask": Jagged.from_list(mask, torch.float32),
            "group": torch.tensor([3, 3, 8, 8, 5]),
            "score": torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]),
            "response_length": lengths - 1,
        }
    )


@pytest.mark.parametrize(("name", "idle", "single"), [("grpo", 12 / 15, 1 / 3), ("reinforce_plus_plus", 0, None)])
def test_shares_of_samples_without_advantage_and_of_groups_of_one(name: str, idle: float, single: float | None) -> None:
    found, metrics, _ = advantages(batch(), AlgorithmSettings(advantage=name), None, max_response_length=8)
    measured = metrics.to_dict()
    assert measured[GRADIENTLESS] == pytest.approx(idle)
    assert measured.get(SINGLE) == (None if single is None else pytest.approx(single))
    assert bool(found.flat("advantages")[-5:].any()) == (name != "grpo")


@pytest.mark.parametrize(
    ("actor", "subjects"),
    [
        ({}, [SINGLE]),
        ({"objective": {"entropy_coeff": 0.1}}, [SINGLE, GRADIENTLESS]),
        ({"objective": {"entropy_coeff": 0.1}, "drop_zero_advantage": False}, [SINGLE]),
    ],
)
def test_warnings(actor: dict[str, Any], subjects: list[str]) -> None:
    """Of updates that are mostly without policy gradient only where a setting, not the user, keeps such samples."""
    algorithm, said = AlgorithmSettings(), {}
    session: Any = SimpleNamespace(
        config=SimpleNamespace(actor=ActorSettings(**actor), algorithm=algorithm), warn_once=said.__setitem__
    )
    warn_of_gradientless(session, advantages(batch(), algorithm, None, max_response_length=8)[1])
    assert list(said) == subjects
    assert said[SINGLE].startswith("33% of the groups of a step have a single sample: grpo has nothing")
    if GRADIENTLESS in said:
        assert said[GRADIENTLESS].startswith("80% of the tokens")
        assert "because of actor.objective.entropy_coeff=0.1;" in said[GRADIENTLESS]
