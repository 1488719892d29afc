"""Settings of the quickstart, tuned for two CPU cores and three minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlcore.config import validate_config
from rlcore.engines import OptimSettings
from rlcore_recipes.data.prepare.arithmetic import ArithmeticTask
from rlcore_recipes.grpo import GRPOConfig

TASK = ArithmeticTask(columns=True, pad=False, names=16, items=12, phrases=3)
TRAIN_PROBLEMS, TEST_PROBLEMS = 16384, 400

# SFT ends at the first check at which this fraction of sampled answers is right: mediocre, yet enough to learn from.
MEDIOCRE = 0.4
SFT_BATCH, SFT_CHECK_EVERY, SFT_MOST_STEPS, SFT_CHECK_PROBLEMS = 64, 20, 600, 200
SFT_OPTIM = OptimSettings(lr=2e-3, betas=(0.9, 0.95), warmup_steps=20)

LR = 2.5e-4
MAX_PROMPT, MAX_RESPONSE = 64, 48
METRIC = "val-core/arithmetic/reward/mean@1"


def grpo_config(out: Path, seed: int, steps: int) -> GRPOConfig:
    """GRPO on the model in ``out/sft``. Many prompts with few completions learn faster here than few with many."""
    values: dict[str, Any] = {
        "seed": seed,
        "model": {"path": str(out / "sft")},
        "data": {
            "train_files": [str(out / "data/train.parquet")],
            "val_files": [str(out / "data/test.parquet")],
            "train_batch_size": 96,
            "max_prompt_length": MAX_PROMPT,
            "max_response_length": MAX_RESPONSE,
        },
        "actor": {
            "mini_batch_size": 24,
            "old_logprobs": "rollout",
            "optim": {"lr": LR, "betas": [0.9, 0.95], "schedule": "linear", "warmup_steps": 20, "min_lr_ratio": 0.1},
            "objective": {"policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.28}},
        },
        "rollout": {"n": 4, "validation": {"temperature": 1.0}},
        "reward": {"name": "gsm8k"},
        "trainer": {
            "out_dir": str(out / "grpo"),
            "name": "quickstart",
            "total_steps": steps,
            "test_freq": 10,
            "log_val_generations": 8,
            "save_freq": 50,
            "keep_checkpoints": 1,
            "save_hf": True,
        },
    }
    return validate_config(GRPOConfig, values)
