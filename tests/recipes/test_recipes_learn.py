"""Each recipe, from the command line, on a task it learns in seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LEARN = {"trainer.total_steps": 25, "data.train_batch_size": 16, "actor.optim.lr": 1e-2}


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("grpo", {}),
        ("grpo", {"actor.mini_batch_size": 8}),
        ("grpo", {"algorithm.advantage": "remax", "actor.optim.lr": 3e-2}),
        ("ppo", {"critic.optim.lr": 3e-3, "critic.warmup_steps": 2}),
        ("dapo", {"algorithm.overlong": "null"}),
        ("online_dpo", {"actor.mini_batch_size": 8}),
        ("online_dpo", {"actor.objective.loss": "{name: simpo, gamma: 0}", "algorithm.pairs": "all-pairs"}),
    ],
)
def test_reward_rises(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, recipe: str, changes: dict[str, Any]
) -> None:
    result = task.run(recipe, tmp_path, {**LEARN, **changes})
    assert result.exit_code == 0, result.output
    scores = [line["critic/score/mean"] for line in metrics_of(tmp_path)]
    assert len(scores) == 25
    assert scores[0] < 0.2
    assert sum(scores[-3:]) / 3 > 0.8, scores
