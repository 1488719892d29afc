"""Keys of TRL, verl and OpenRLHF are answered with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlcore.config import Config, load_config
from rlcore.config.keys import sections
from rlcore.errors import ConfigError
from rlcore_recipes.dapo import DAPOConfig
from rlcore_recipes.foreign.names import OPENRLHF, TRL
from rlcore_recipes.foreign.preference_names import OPENRLHF_PREFERENCES, TRL_PREFERENCES
from rlcore_recipes.foreign.reward_names import OPENRLHF_REWARDS, TRL_REWARDS
from rlcore_recipes.grpo import GRPOConfig
from rlcore_recipes.ppo import PPOConfig
from rlcore_recipes.settings.preference import PreferenceConfig
from rlcore_recipes.settings.supervised import RewardModelConfig, SFTConfig

NEEDED = ("model.path=m", "data.train_files=t.jsonl", "reward.name=gsm8k", "trainer.out_dir=o")


def problem(model: type[Config], *overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(model, path, overrides)
    return str(raised.value)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("learning_rate", "TRL's learning_rate is actor.optim.lr"),
        ("num_generations", "TRL's num_generations is rollout.n"),
        ("beta", "TRL's beta is actor.objective.kl_loss.coeff"),
        ("per_device_train_batch_size", "TRL's per_device_train_batch_size is data.train_batch_size (counts prompts"),
        ("kl_coef", "TRL's kl_coef is algorithm.kl_in_reward.coeff"),
        ("ppo_mini_batch_size", "verl's actor_rollout_ref.actor.ppo_mini_batch_size is actor.mini_batch_size"),
        ("actor_rollout_ref.actor.optim.lr", "verl's actor_rollout_ref.actor.optim.lr is actor.optim.lr"),
        ("algorithm.kl_ctrl.kl_coef", "verl's algorithm.kl_ctrl.kl_coef is algorithm.kl_in_reward.coeff"),
        ("trainer.total_training_steps", "verl's trainer.total_training_steps is trainer.total_steps"),
        ("actor_rollout_ref.model.use_remove_padding", "has no key here: nothing to set: sequences are always packed"),
        ("n_samples_per_prompt", "OpenRLHF's n_samples_per_prompt is rollout.n"),
        ("train_batch_size", "or did you mean data.train_batch_size?"),
        ("rollout.num_generations", "TRL's num_generations is rollout.n"),
        ("critic_learning_rate", "critic.optim.lr, which this recipe does not have"),
        ("temperature", "did you mean rollout.temperature or rollout.validation.temperature?"),
    ],
)
def test_an_unknown_key_that_another_framework_has_is_answered_with_ours(key: str, answer: str) -> None:
    text = problem(GRPOConfig, *NEEDED, f"{key}=1")
    assert "unknown key" in text
    assert answer in text


def test_sections_of_verl_in_a_file_are_answered_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("actor_rollout_ref:\n  actor: {ppo_epochs: 2, grad_clip: 1}\n  rollout: {n: 3}\n")
    text = problem(GRPOConfig, *NEEDED, path=file)
    assert "verl's actor_rollout_ref.actor.ppo_epochs is actor.epochs" in text
    assert "verl's actor_rollout_ref.rollout.n is rollout.n" in text
    assert f"({file}:1)" in text


def test_supervised_fine_tuning_has_its_own_answers() -> None:
    text = problem(SFTConfig, *(key for key in NEEDED if "reward" not in key), "max_seq_length=8", "optim.lr=1")
    assert "TRL's max_seq_length is data.max_length" in text
    assert "verl's optim.lr is actor.optim.lr" in text


def test_preference_optimisation_has_its_own_answers() -> None:
    keys = (key for key in NEEDED if "reward" not in key)
    text = problem(PreferenceConfig, *keys, "beta=0.1", "loss_type=sigmoid", "lora_r=8")
    assert "TRL's beta is actor.objective.loss.beta" in text
    assert "TRL's loss_type is actor.objective.loss (sigmoid: dpo" in text
    assert "TRL's lora_r is actor.fsdp.lora.rank" in text


def test_reward_models_have_their_own_answers() -> None:
    keys = (key for key in NEEDED if "reward" not in key)
    text = problem(RewardModelConfig, *keys, "center_rewards_coefficient=0.01", "margin_loss=true", "learning_rate=1")
    assert "TRL's center_rewards_coefficient is actor.objective.loss.centering" in text
    assert "OpenRLHF's margin_loss is data.margin_key" in text
    assert "actor.optim.lr" in text


def test_every_key_of_ours_in_the_tables_exists() -> None:
    known: set[str] = set()
    models: tuple[Any, ...] = (GRPOConfig, PPOConfig, DAPOConfig, SFTConfig, PreferenceConfig, RewardModelConfig)
    for model in models:
        for section in sections(model):
            known |= {section.path, *(f"{section.path}.{key.name}".lstrip(".") for key in section.keys)}
    for names in (TRL, OPENRLHF, TRL_PREFERENCES, OPENRLHF_PREFERENCES, TRL_REWARDS, OPENRLHF_REWARDS):
        for name, equivalent in names.items():
            assert set(equivalent.ours) <= known, name
            assert equivalent.ours or equivalent.remark, name


def test_names_that_are_ours_need_no_entry() -> None:
    for names in (TRL, OPENRLHF):
        for name, equivalent in names.items():
            assert all(key.rpartition(".")[2] != name for key in equivalent.ours), name
