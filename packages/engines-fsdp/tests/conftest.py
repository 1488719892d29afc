"""Two rank processes that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlcore_kit.testing.processes import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(2, ["rlcore_fsdp.engine"])
    yield pool
    pool.close()
