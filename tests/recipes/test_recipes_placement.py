"""The same run on one process and over Ray, however its roles are placed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlcore_kit.testing.tiny_model import tiny_tokenizer

# Far from the sign-like steps that Adam makes at the start, which would blow differences in the last bit up.
ADAM = {"lr": 1e-3, "eps": 1e-4}
RUN = {
    "trainer.total_steps": 2,
    "trainer.test_freq": 2,
    "trainer.val_before_train": False,
    "trainer.save_hf": True,
    "actor.fsdp.device": "cpu",
    "actor.optim": ADAM,
}
REINFORCEMENT = {"actor.objective.kl_loss.coeff": 0.01, "actor.mini_batch_size": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "grpo": {**RUN, **REINFORCEMENT},
    "ppo": {**RUN, **REINFORCEMENT, "critic.optim": ADAM, "critic.fsdp.device": "cpu"},
    "dapo": {**RUN, "actor.mini_batch_size": 4, "algorithm.overlong": {"buffer": 4}},
    "sft": {**RUN, **dict.fromkeys(["data.max_response_length", "data.max_prompt_length", "rollout.n",
                                    "reward.path", "reward.workers"])},
}  # fmt: skip
PLACED = {
    "everything in one place": (
        "grpo",
        {"all": {"processes": 2}},
        dict.fromkeys(["actor", "ref", "rollout", "reward_model", "reward", "compute"], "all"),
    ),
    "disaggregated rollout, with a reward model on its pool": (
        "grpo",
        {"train": {"processes": 2}, "gen": {"processes": 1}},
        {"actor": "train", "ref": "train", "rollout": "gen", "reward_model": "gen"},
    ),
    "two rollout replicas of fractional cores": (
        "grpo",
        {"train": {"processes": 1}, "gen": {"processes": 2, "cpus_per_process": 0.5, "strategy": "spread"}},
        {"actor": "train", "ref": "train", "rollout": "gen", "reward_model": "train"},
    ),
    "reward model and policy share a GPU": (
        "grpo",
        {"train": {"gpus_per_process": 0.5}, "judge": {"gpus_per_process": 0.5}},
        {"actor": "train", "ref": "train", "rollout": "train", "reward_model": "judge"},
    ),
    "four processes": ("grpo", {"all": {"processes": 4, "cpus_per_process": 0.5}}, {}),
    "critic and reference apart": (
        "ppo",
        {"train": {}, "value": {}, "reference": {}},
        {"actor": "train", "rollout": "train", "critic": "value", "ref": "reference"},
    ),
    "two reward processes": (
        "ppo",
        {"models": {"processes": 2, "strategy": "strict_pack"}, "judges": {"processes": 2, "cpus_per_process": 0.5}},
        {**dict.fromkeys(["actor", "critic", "ref", "rollout"], "models"), "reward": "judges", "compute": "judges"},
    ),
    "critic with four processes": (
        "ppo",
        {"all": {"processes": 4, "cpus_per_process": 0.5}},
        {},
    ),
    "dapo, rollout apart": (
        "dapo",
        {"train": {"processes": 2}, "gen": {"processes": 1}},
        {"actor": "train", "rollout": "gen"},
    ),
    "dapo with four processes": ("dapo", {"all": {"processes": 4, "cpus_per_process": 0.5}}, {}),
    "sft with two processes": ("sft", {"all": {"processes": 2}}, {}),
    "sft with four processes": ("sft", {"all": {"processes": 4, "cpus_per_process": 0.5}}, {}),
}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return score_model(tmp_path_factory.mktemp("judge"))


def score_model(path: Path, vocab_size: int | None = None) -> Path:
    """A random reward model for the tokens of `tiny_model`, without a tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config(
        vocab_size=vocab_size or len(tiny_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        num_labels=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Qwen2ForSequenceClassification(config)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(path)
    return path


def changes_of(recipe: str, judge: Path) -> dict[str, Any]:
    changes = CHANGES[recipe]
    return {**changes, "reward_model.model.path": judge, "reward_model.coeff": 0.25} if recipe == "grpo" else changes


@pytest.fixture(scope="module")
def alone(task: Any, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a recipe's run in this process alone; each runs once."""
    folders: dict[str, Path] = {}

    def run(recipe: str) -> Path:
        if recipe not in folders:
            folders[recipe] = tmp_path_factory.mktemp("alone") / recipe
            result = task.run(recipe, folders[recipe], changes_of(recipe, judge))
            assert result.exit_code == 0, result.output
        return folders[recipe]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", PLACED)
def test_placed_anywhere_the_run_is_the_same(
    task: Any,
    judge: Path,
    alone: Callable[[str], Path],
    cluster: None,
    metrics_of: Callable[[Path], Any],
    tmp_path: Path,
    case: str,
) -> None:
    recipe, pools, placement = PLACED[case]
    expected = alone(recipe)
    ray_keys = {"controller.kind": "ray", "controller.pools": pools, "controller.placement": placement}
    result = task.run(recipe, tmp_path, {**changes_of(recipe, judge), **ray_keys, "controller.call_timeout_s": 600})
    assert result.exit_code == 0, result.output

    one, placed = metrics_of(expected), metrics_of(tmp_path)
    assert [line["step"] for line in one] == [line["step"] for line in placed]
    compared = set()
    for before, after in zip(one, placed):
        assert before.keys() == {name for name in after if not name.startswith("weight_sync/")}
        for name in before:
            if name.startswith(("actor/", "critic/", "train/", "val", "response_length/", "reward")):
                # fp32 sums in another order, carried through the optimizer steps
                assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-6), (before["step"], name)
                compared.add(name)
    assert {"train/grad_norm" if recipe == "sft" else "actor/grad_norm"} <= compared
    assert ("reward_model/score/mean" in compared) == (recipe == "grpo")

    trained, start = load_file(expected / "model/model.safetensors"), load_file(task.model / "model.safetensors")
    again = load_file(tmp_path / "model/model.safetensors")
    assert trained.keys() == again.keys()
    assert max(float((trained[name] - start[name]).abs().max()) for name in trained) > 1e-4
    assert max(float((trained[name] - again[name]).abs().max()) for name in trained) < 2e-6
