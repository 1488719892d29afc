"""No deadlines for properties, which a busy machine misses; rank processes that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlcore_kit.sandbox.detection import WAYS, fault
from rlcore_kit.testing.processes import RankPool

# on a machine that allows no sandbox, its refusal is tested alone (test_sandbox_choice.py)
collect_ignore = ["test_sandbox.py"] if all(map(fault, WAYS)) else []

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.fixture
def largest() -> Largest:
    """The largest tensor that is made in the fixture's context."""
    return Largest()
