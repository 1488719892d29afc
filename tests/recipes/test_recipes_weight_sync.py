"""Actor and rollout in different processes: whichever way the weights travel, the run is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHANGES = {
    "actor.optim.lr": 1e-3,
    "actor.mini_batch_size": 4,
    "trainer.test_freq": 3,
    "trainer.val_before_train": False,
}
APART = {
    "controller.kind": "ray",
    "controller.pools": "{train: {processes: 2}, gen: {processes: 1}}",
    "controller.placement": "{actor: train, rollout: gen}",
}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "how",
    [{"weight_sync.transport": "shm"}, {"weight_sync.transport": "gloo", "weight_sync.delta": True}],
    ids=["shm", "gloo-delta"],
)
def test_weights_that_travel_change_nothing(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, how: dict[str, Any]
) -> None:
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    assert task.run("grpo", alone, CHANGES).exit_code == 0
    result = task.run("grpo", apart, {**CHANGES, **APART, **how})
    assert result.exit_code == 0, result.output
    for before, after in zip(metrics_of(alone), metrics_of(apart), strict=True):
        names = [name for name in before if name.startswith(("actor/", "critic/", "val", "response_length/"))]
        assert len(names) > 10
        for name in names:
            # fp32 sums in another order, carried through three optimizer steps
            assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-5), (before["step"], name)
