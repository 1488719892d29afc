"""Data sets and reward functions made for verl and for TRL, unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

VERL = """
async def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert (data_source, ground_truth) == ("letters", "abc") and extra_info["index"] >= 0
    return {"score": kwargs["scale"] * len(solution_str), "acc": 0.5, "pred": solution_str, "why": "long"}
"""
TRL = """
def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def format_reward(prompts, completions, target, **kwargs):
    assert prompts[0].startswith("say") and target[0] == "abc"
    return [None for _ in completions]
"""


def metrics(out_dir: Path) -> dict[str, Any]:
    return json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[-1])


def test_verls_parquet_file_and_reward_function(task: Any, tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "letters",
            "prompt": [{"role": "user", "content": f"say {number}"}],
            "ability": "letters",
            "reward_model": {"style": "rule", "ground_truth": "abc"},
            "extra_info": {"split": "train", "index": number},
        }
        for number in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "reward.py").write_text(VERL)
    changes = {
        "data.train_files": tmp_path / "train.parquet",
        "data.val_files": None,
        "reward.path": f"{tmp_path}/reward.py:compute_score",
        "reward.function.kwargs": "{scale: 2}",
        "trainer.total_steps": 1,
    }
    result = task.run("grpo", tmp_path / "out", changes)
    assert result.exit_code == 0, result.output
    assert "ground truth from 'reward_model.ground_truth' (verl's layout)" in result.output
    found = metrics(tmp_path / "out")
    assert (found["reward/acc"], found["reward/error_ratio"]) == (0.5, 0.0)


def test_trls_data_set_and_reward_functions(task: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {number}", "target": "abc"} for number in range(8)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    (tmp_path / "rewards.py").write_text(TRL)
    functions = ("length_reward", "format_reward")
    parts = [
        f"{{name: function, label: {name}, weight: 0.5, function: {{path: '{tmp_path}/rewards.py:{name}'}}}}"
        for name in functions
    ]
    changes = {
        "data.train_files": tmp_path / "data",
        "data.val_files": None,
        "reward.path": None,
        "reward.name": "combine",
        "reward.combine.rewards": f"[{', '.join(parts)}]",
        "trainer.total_steps": 1,
    }
    result = task.run("grpo", tmp_path / "out", changes)
    assert result.exit_code == 0, result.output
    found = metrics(tmp_path / "out")
    assert found["reward/error_ratio"] == 0.0
    assert found["reward/length_reward/score"] > 0
    assert "reward/format_reward/score" not in found, "it applies to no sample"
