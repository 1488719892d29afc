"""The same run on one process and on two: every rank runs the same program on its part of the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# five and one of six validation prompts: one rank has none of the last part
CHANGES = {"trainer.test_freq": 2, "trainer.save_freq": 2, "actor.optim.lr": 1e-3, "data.val_batch_size": 5}


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("ppo", {"critic.optim.lr": 1e-3, "actor.objective.kl_loss.coeff": 0.01, "actor.mini_batch_size": 4}),
        # a batch of one sample, of which one rank has none
        ("ppo", {"critic.optim.lr": 1e-3, "actor.objective.kl_loss.coeff": 0.01, "data.train_batch_size": 1,
                 "rollout.n": 1, "algorithm.advantage": "{name: gae, lam: 0.9}"}),
        # rounds that keep a few samples, or one, or none
        ("raft", {"algorithm.selection.selector": "{name: top-fraction, fraction: 0.02}", "algorithm.restart": True,
                  "algorithm.rationalization.hint": "' ({ground_truth})'", "algorithm.selection.keep_truncated": True}),
        ("prime", {"prm.optim.lr": 1e-3, "prm.right_above": 0.12, "algorithm.dynamic_sampling": "null"}),
        ("online_dpo", {"actor.mini_batch_size": 4}),
        ("sft", {"data.max_response_length": None, "data.max_prompt_length": None, "rollout.n": None,
                 "reward.path": None, "reward.workers": None}),
    ],
)  # fmt: skip
def test_two_ranks_compute_what_one_does(
    task: Any, metrics_of: Callable[[Path], Any], tmp_path: Path, recipe: str, changes: dict[str, Any]
) -> None:
    alone, together, changes = tmp_path / "alone", tmp_path / "together", {**CHANGES, **changes}
    assert task.run(recipe, alone, changes).exit_code == 0
    if recipe == "sft":
        ranks = [task.start(recipe, together, changes, processes=2)]  # torchrun, which starts them
    else:
        ranks = task.fork(recipe, together, changes, processes=2)
    for process in ranks:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    one, two = metrics_of(alone), metrics_of(together)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 1, 2, 3]
    compared = 0
    for before, after in zip(one, two):
        assert before.keys() == after.keys()
        for name in before:
            if name.startswith(("actor/", "critic/", "train/", "val", "response_length/", "reward/")):
                # fp32 sums in another order, carried through three optimizer steps
                assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-5), (before["step"], name)
                compared += 1
    assert compared > 10
    # a checkpoint of two ranks continues on one
    result = task.run(recipe, together, {**changes, "trainer.total_steps": 4})
    assert result.exit_code == 0, result.output
    assert metrics_of(together)[-1]["step"] == 4
