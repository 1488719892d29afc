"""Conformance suite for rewards."""

from __future__ import annotations

import asyncio
import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from rlcore.engines.reward import Reward, RewardResult, RewardSample

STRANGE_COMPLETIONS = {
    "empty": "",
    "null": "\x00",
    "lone surrogate": "\ud800",
    "combining": "e\u0301\u200d\U0001f9d1\u200d\U0001f680",
    "right to left": "\u202e####  81\u202c",
    "digits": "9" * 10_000,
    "braces": "{" * 10_000,
    "long": "the answer is 1 " * 50_000,
}


class RewardConformance(ABC):
    """Checks the contract of `rlcore.engines.reward.Reward`.

    Subclass it under a name that pytest collects::

        class TestMyReward(RewardConformance):
            def make(self):
                return MyReward()

            def cases(self):
                return [(RewardSample([], "right", "right"), 1.0), (RewardSample([], "wrong", "right"), 0.0)]
    """

    @abstractmethod
    def make(self) -> Reward:
        """Make a new reward; all tests share one, except the test of `Reward.close`."""

    @abstractmethod
    def cases(self) -> Sequence[tuple[RewardSample, float]]:
        """Return samples and their scores, of which at least two differ."""

    @pytest.fixture(scope="class")
    @classmethod
    def reward(cls) -> Iterator[Reward]:
        """Make the reward that the tests share."""
        reward = cls().make()
        yield reward
        reward.close()

    def test_scores_each_case(self, reward: Reward) -> None:
        cases = self.cases()
        assert len({score for _, score in cases}) > 1, "cases() must return at least two different scores"
        for sample, score in cases:
            result = asyncio.run(reward.score(sample))
            _check(result)
            assert result.error is None, f"{sample} failed"
            assert result.score == pytest.approx(score), sample

    def test_a_batch_keeps_its_order(self, reward: Reward) -> None:
        cases = [*self.cases()] * 20
        results = reward.score_batch([sample for sample, _ in cases])
        assert [result.score for result in results] == pytest.approx([score for _, score in cases])

    def test_works_in_successive_event_loops(self, reward: Reward) -> None:
        sample, score = self.cases()[0]
        for _ in range(3):
            assert reward.score_batch([sample])[0].score == pytest.approx(score)

    def test_works_in_event_loops_of_several_threads(self, reward: Reward) -> None:
        cases = [*self.cases()] * 4
        with ThreadPoolExecutor(len(cases)) as threads:
            results = list(threads.map(lambda case: reward.score_batch([case[0]])[0], cases))
        assert [result.score for result in results] == pytest.approx([score for _, score in cases])

    @pytest.mark.parametrize("name", STRANGE_COMPLETIONS)
    def test_a_strange_completion_costs_only_itself(self, reward: Reward, name: str) -> None:
        good, score = self.cases()[0]
        results = reward.score_batch([replace(good, completion=STRANGE_COMPLETIONS[name]), good])
        _check(results[0])
        assert results[1].score == pytest.approx(score)

    @pytest.mark.parametrize("ground_truth", [None, "", [], {"no": object}], ids=["none", "empty", "list", "dict"])
    def test_a_strange_ground_truth_costs_only_its_sample(self, reward: Reward, ground_truth: object) -> None:
        good, score = self.cases()[0]
        results = reward.score_batch([replace(good, ground_truth=ground_truth), good])
        _check(results[0])
        assert results[1].score == pytest.approx(score)

    def test_does_not_change_samples(self, reward: Reward) -> None:
        for sample, _ in self.cases():
            before = copy.deepcopy(sample)
            reward.score_batch([sample])
            assert sample == before

    def test_a_cancelled_call_harms_no_other(self, reward: Reward) -> None:
        cases = [*self.cases()] * 4

        async def cancel_every_other() -> list[RewardResult]:
            tasks = [asyncio.ensure_future(reward.score(sample)) for sample, _ in cases]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return [task.result() for task in tasks[1::2]]

        results = asyncio.run(cancel_every_other())
        assert [result.score for result in results] == pytest.approx([score for _, score in cases[1::2]])

    def test_stats_are_counts(self, reward: Reward) -> None:
        reward.score_batch([sample for sample, _ in self.cases()])
        stats = reward.stats()
        assert all(isinstance(name, str) and isinstance(count, int) and count >= 0 for name, count in stats.items())
        if stats:
            assert stats["errors"] == sum(count for name, count in stats.items() if name.startswith("errors/"))
            assert stats["samples"] >= len(self.cases())

    def test_can_be_closed_twice(self) -> None:
        reward = self.make()
        reward.close()
        reward.close()


def _check(result: RewardResult) -> None:
    assert isinstance(result, RewardResult)
    assert isinstance(result.score, float)
    assert math.isfinite(result.score)
    assert all(isinstance(name, str) and math.isfinite(value) for name, value in result.extras.items())
    assert result.answer is None or isinstance(result.answer, str)
