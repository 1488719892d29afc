"""`RankPool` runs real processes and names the rank that fails or hangs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from rlcore_kit.testing.processes import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def who(offset: int) -> tuple[int, int, int]:
    return os.getpid(), int(os.environ["RANK"]) + offset, int(os.environ["WORLD_SIZE"])


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("one is unwell")
    time.sleep(60)


def hang_on_rank_zero() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(60)


def die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)


def test_results_are_in_rank_order_and_processes_are_reused(pool: RankPool) -> None:
    first, second = pool.run(who, 10), pool.run(who, 20)
    assert [result[1:] for result in first] == [(10, 2), (11, 2)]
    assert [result[1:] for result in second] == [(20, 2), (21, 2)]
    assert [result[0] for result in first] == [result[0] for result in second]
    assert os.getpid() not in {result[0] for result in first}


def test_a_failure_shows_its_traceback_and_the_ranks_that_waited(pool: RankPool) -> None:
    with pytest.raises(
        AssertionError, match=r"(?s)rank 1 failed:.*one is unwell.*ranks \[0\] of 2 did not return after"
    ):
        pool.run(fail_on_rank_one)
    assert len(pool.run(who, 0)) == 2, "the next call starts new processes"


def test_a_rank_that_hangs_is_named(pool: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] of 2 did not return within 1 s"):
        pool.run(hang_on_rank_zero, timeout=1)


def test_a_rank_that_dies_is_named(pool: RankPool) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:\nthe process died"):
        pool.run(die_on_rank_one)
