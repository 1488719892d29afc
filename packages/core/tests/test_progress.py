"""Long calls report how far they have come."""

from __future__ import annotations

from rlcore.engines import Reward, RewardResult, RewardSample
from rlcore.progress import listening, report


class One(Reward):
    async def score(self, sample: RewardSample) -> RewardResult:
        return RewardResult(1.0)


def test_rewards_report_every_sample() -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *args: heard.append(args)):
        One().score_batch([RewardSample([], "")] * 3, concurrency=1)
    report("things", 1, 1)
    assert heard == [("completions scored", number, 3) for number in (1, 2, 3)]
