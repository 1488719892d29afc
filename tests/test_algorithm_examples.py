"""The estimators and losses that the documentation and the examples print keep to their contracts."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from rlcore.algorithms import advantages, policy_losses
from rlcore.batch import Batch
from rlcore.plugins import import_algorithms
from rlcore_kit.testing import algorithms

ROOT = Path(__file__).parent.parent
ESTIMATORS = ("mine", "careful", "rank")
LOSSES = ("best_against_worst", "topr")


class Advantage(algorithms.AdvantageConformance):
    def batch(self, seed: int) -> Batch:
        batch = super().batch(seed)
        return batch.with_columns(extra=[{"difficulty": 1 + row % 3} for row in range(len(batch))])


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register them for one test, also where a test of another module has done so in this process."""
    import_algorithms()  # those of installed packages stay registered
    for registry in (advantages, policy_losses):
        others = {name: entry for name, entry in registry._entries.items() if name not in (*ESTIMATORS, *LOSSES)}
        monkeypatch.setattr(registry, "_entries", others)
    for code in re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "algorithms.md").read_text(), re.MULTILINE | re.DOTALL
    ):
        exec(code, {"__name__": "page"})
    for name in ("custom_advantage", "custom_loss"):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(registered: None, name: str) -> None:
    suite = Advantage()
    suite.name = name
    suite.test_one_number_per_token_and_none_where_masked(0)
    suite.test_the_order_of_samples_does_not_matter(0)
    suite.test_the_numbers_of_groups_do_not_matter()
    suite.test_masked_values_are_never_read(float("nan"))
    suite.test_does_not_change_the_batch()


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses(registered: None, name: str) -> None:
    suite = algorithms.PolicyLossConformance()
    suite.name = name
    suite.test_one_number_per_token_and_a_gradient_where_trained(0)
    suite.test_the_order_of_samples_does_not_matter(0)
    suite.test_the_division_into_micro_batches_does_not_matter(1)
    suite.test_masked_values_are_never_read(float("nan"))
    suite.test_samples_without_trained_tokens_have_no_loss()
    suite.test_vanishes_with_the_advantage()
