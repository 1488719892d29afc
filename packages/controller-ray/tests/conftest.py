"""Forked Ray workers, and no deadlines for properties, which a busy machine misses."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from rlcore_kit.testing.forks import ForkServer

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    server = ForkServer("torch.distributed", "rlcore.batch", "rlcore.engines")
    yield server
    server.close()


@pytest.fixture(scope="module")
def forked_workers(forks: ForkServer) -> Iterator[None]:
    """For modules whose tests are not about how Ray starts and ends workers."""
    with forks.ray_workers():
        yield
