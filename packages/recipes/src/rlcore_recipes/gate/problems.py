"""Problems of the learning gate: data and first models that small models learn from in seconds.

Tasks run in one folder, below which every problem has its own. Paths in configurations are relative to it.
"""

from __future__ import annotations

import random
import shutil
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlcore.config import load_config, validate_config
from rlcore_recipes.data.prepare.arithmetic import ArithmeticTask, arithmetic_problems
from rlcore_recipes.data.prepare.rows import prompt_row
from rlcore_recipes.data.prepare.writing import write_splits
from rlcore_recipes.games.prepare import GamesOptions, prepare_games
from rlcore_recipes.small_model.qwen2 import SmallModelSettings, write_small_model

Keys = Mapping[str, Any]

LETTERS_REWARD = '''"""The share of lower-case letters among eight characters."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(c.isascii() and c.islower() for c in solution_str[:8]) / 8
'''


@dataclass(frozen=True)
class Problem:
    """Data, a first model and a reward.

    Attributes:
        prepare: writes them into an empty folder, which problems with the same function share.
        keys: configuration keys of every task on it; paths start with the name of the folder.
    """

    name: str
    summary: str
    prepare: Callable[[Path], None]
    keys: Keys

    @property
    def folder(self) -> str:
        """The name of the folder below the root of the gate."""
        return self.prepare.__name__


def prepare(problem: Problem, root: Path) -> None:
    """Write the files of ``problem`` below ``root``, if they are not there."""
    folder, partial = root / problem.folder, root / f".{problem.folder}"
    if folder.exists():
        return
    shutil.rmtree(partial, ignore_errors=True)  # of a preparation that was interrupted
    partial.mkdir(parents=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models are small, and threads would wait for each other
    try:
        problem.prepare(partial)
    finally:
        torch.set_num_threads(threads)
    partial.rename(folder)


def letters(folder: Path) -> None:
    """Write a random model and prompts; the reward counts lower-case letters."""
    rows = [prompt_row(f"say {number}", "x", "letters", response="abcdefgh", index=number) for number in range(64)]
    write_splits({"train": rows, "test": rows[:16]}, folder)
    texts = [row["prompt"][0]["content"] for row in rows]
    settings = SmallModelSettings(
        vocab_size=300, hidden_size=32, layers=2, intermediate_size=64, max_position_embeddings=64
    )
    write_small_model(folder / "model", texts, settings)
    (folder / "reward.py").write_text(LETTERS_REWARD, encoding="utf-8")


def judged_letters(folder: Path) -> None:
    """Write what `letters` does, and a reward model that prefers lower-case letters."""
    from rlcore_recipes.rm import run as run_rm
    from rlcore_recipes.settings.supervised import RewardModelConfig

    letters(folder)
    write_splits({"train": _compared_letters(1024)}, folder / "comparisons")
    keys = {
        **_sample_keys(str(folder / "model"), str(folder / "comparisons")),
        "data.val_files": "[]",
        "actor.optim.lr": 3e-3,
        "trainer.total_steps": 60,
        "trainer.out_dir": folder / "rm",
        "trainer.save_hf": "true",
    }
    run_rm(load_config(RewardModelConfig, None, [f"{key}={value}" for key, value in keys.items()]))
    (folder / "rm/model").rename(folder / "reward_model")


def _compared_letters(count: int) -> list[dict[str, Any]]:
    """Return pairs of eight letters, of which the chosen ones have more lower-case letters."""
    draw = random.Random(0)

    def answer(lower: int) -> str:
        return "".join(
            [*draw.choices(string.ascii_lowercase, k=lower), *draw.choices(string.ascii_uppercase, k=8 - lower)]
        )

    rows = []
    for number in range(count):
        fewer, more = sorted(draw.sample(range(9), 2))
        prompt = [{"role": "user", "content": f"say {number % 64}"}]
        sides = {"chosen": answer(more), "rejected": answer(fewer)}
        rows.append({"prompt": prompt, **sides, "data_source": "letters"})
    return rows


def arithmetic(folder: Path) -> None:
    """Write sums up to six in words, right and wrong solutions of them, and two models: one that answers four of ten,
    and one that knows nothing.
    """
    from rlcore_recipes.grpo import GRPOConfig
    from rlcore_recipes.quickstart.train_sft import train_sft

    drawn = arithmetic_problems(ArithmeticTask(digits=1, names=16, items=12, phrases=3), 12_000, 1, seed=0)["train"]
    rows = [row for row in drawn if int(row["ground_truth"]) <= 6]
    splits = {"train": rows[:1024], "test": rows[1024:1280]}
    write_splits(splits, folder)
    write_splits({name: list(map(_comparison, rows)) for name, rows in splits.items()}, folder / "comparisons")
    texts = [text for row in splits["train"] for text in (row["prompt"][0]["content"], row["response"])]
    settings = SmallModelSettings(hidden_size=64, layers=2, intermediate_size=192, max_position_embeddings=128)
    write_small_model(folder / "base", texts, settings)
    keys = {**_rollout_keys(str(folder), 48, 12), "reward.name": "gsm8k", "trainer.out_dir": str(folder / "none")}
    config = load_config(GRPOConfig, None, [f"{key}={value}" for key, value in keys.items()])
    train_sft(folder / "base", folder / "model", config, lambda step, loss, right: None)


def _comparison(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of preferences: the solution of ``row``, and the same with another sum."""
    right = int(row["ground_truth"])
    wrong = (right + 1 + row["extra_info"]["index"] % 6) % 7
    rejected = row["response"].replace(f"{right:02d}", f"{wrong:02d}")
    return {
        "prompt": row["prompt"],
        "chosen": row["response"],
        "rejected": rejected,
        "data_source": row["data_source"],
    }


def nim(folder: Path) -> None:
    """Write states of Nim with up to five stones, and a model that makes random moves, most of them legal."""
    from rlcore_recipes.settings.supervised import SFTConfig
    from rlcore_recipes.sft import run as run_sft

    splits = prepare_games(validate_config(GamesOptions, {"game": {"name": "nim", "stones": 5}, "train": 320}))
    write_splits(splits, folder)
    texts = [text for row in splits["train"] for text in (row["prompt"][0]["content"], row["response"])]
    settings = SmallModelSettings(hidden_size=64, layers=2, intermediate_size=192, max_position_embeddings=256)
    write_small_model(folder / "base", texts, settings)
    keys = {
        "model.path": folder / "base",
        "data.train_files": folder / "train.parquet",
        "data.train_batch_size": 32,
        "actor.optim.lr": 2e-3,
        "trainer.total_steps": 90,
        "trainer.trackers": "[jsonl]",
        "trainer.save_hf": "true",
        "trainer.out_dir": folder / "sft",
    }
    run_sft(load_config(SFTConfig, None, [f"{key}={value}" for key, value in keys.items()]))
    (folder / "sft/model").rename(folder / "model")


def _rollout_keys(name: str, prompt: int, response: int) -> dict[str, Any]:
    return {
        "model.path": f"{name}/model",
        "data.train_files": f"{name}/train.parquet",
        "data.val_files": f"{name}/test.parquet",
        "data.max_prompt_length": prompt,
        "data.max_response_length": response,
        "trainer.trackers": "[jsonl]",
        "rollout.validation.temperature": 1.0,
    }


def _sample_keys(model: str, data: str) -> dict[str, Any]:
    return {
        "model.path": model,
        "data.train_files": f"{data}/train.parquet",
        "data.val_files": f"{data}/test.parquet",
        "data.train_batch_size": 32,
        "data.max_length": 64,
        "trainer.trackers": "[jsonl]",
        "actor.optim.betas": "[0.9, 0.95]",
    }


PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem(
            "letters",
            "eight characters, the more lower-case letters the better; from a random model",
            letters,
            {**_rollout_keys("letters", 32, 8), "reward.path": "letters/reward.py:compute_score", "reward.workers": 1},
        ),
        Problem(
            "judged-letters",
            "letters, scored by a reward model that was trained on comparisons",
            judged_letters,
            {
                **_rollout_keys("judged_letters", 32, 8),
                "reward.name": "none",
                "reward_model.model.path": "judged_letters/reward_model",
            },
        ),
        Problem(
            "arithmetic",
            "sums up to six in words; from a model that answers four of ten",
            arithmetic,
            {**_rollout_keys("arithmetic", 48, 12), "reward.name": "gsm8k"},
        ),
        Problem(
            "solutions",
            "worked solutions of the sums; from a random model",
            arithmetic,
            {
                **_sample_keys("arithmetic/base", "arithmetic"),
                "reward.name": "gsm8k",
                "rollout.max_response_length": 12,
            },
        ),
        Problem(
            "comparisons",
            "solutions with the right and with a wrong sum; from the model of arithmetic",
            arithmetic,
            _sample_keys("arithmetic/model", "arithmetic/comparisons"),
        ),
        Problem(
            "nim",
            "Nim with five stones against random moves; from a model that moves at random",
            nim,
            {**_rollout_keys("nim", 64, 128), "game": "{name: nim, stones: 5}", "opponent": "random", "move_tokens": 6},
        ),
    )
}
