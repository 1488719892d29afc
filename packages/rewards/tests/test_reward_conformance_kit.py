"""The conformance suite must fail rewards that break the contract."""

from __future__ import annotations

import pytest

BROKEN = {
    "raises on strange text": (
        "if len(sample.completion) > 1: raise ValueError\n        return RewardResult(float(sample.completion == 'a'))",
        "test_a_strange_completion_costs_only_itself*",
    ),
    "returns a bare number": ("return float(sample.completion == 'a')", "test_scores_each_case"),
    "returns NaN": (
        "return RewardResult(float('nan') if sample.ground_truth is None else float(sample.completion == 'a'))",
        "test_a_strange_ground_truth_costs_only_its_sample*none*",
    ),
    "belongs to one event loop": (
        "self.lock = getattr(self, 'lock', None) or asyncio.get_running_loop()\n"
        "        assert self.lock is asyncio.get_running_loop()\n"
        "        return RewardResult(float(sample.completion == 'a'))",
        "test_works_in_successive_event_loops",
    ),
    "changes the sample": (
        "sample.prompt.append({})\n        return RewardResult(float(sample.completion == 'a'))",
        "test_does_not_change_samples",
    ),
}

SUITE = """
import asyncio
from rlcore.engines.reward import Reward, RewardResult, RewardSample
from rlcore_kit.testing.reward import RewardConformance

class Broken(Reward):
    async def score(self, sample):
        {body}

class TestBroken(RewardConformance):
    def make(self):
        return Broken()

    def cases(self):
        return [(RewardSample([], "a", "a"), 1.0), (RewardSample([], "b", "a"), 0.0)]
"""

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("fault", [None, *BROKEN])
def test_the_suite_passes_good_rewards_and_finds_each_fault(pytester: pytest.Pytester, fault: str | None) -> None:
    body, failing = BROKEN[fault] if fault else ("return RewardResult(float(sample.completion == 'a'))", None)
    pytester.makepyfile(SUITE.format(body=body))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    if failing is None:
        assert result.ret == 0
    else:
        result.stdout.fnmatch_lines([f"FAILED *::{failing}*"])
