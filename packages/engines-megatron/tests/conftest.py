"""Rank processes that all tests share: importing megatron-core takes each of them half a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlcore_kit.testing.processes import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()
