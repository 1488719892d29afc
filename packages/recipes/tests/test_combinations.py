"""Combinations of settings that are legal and almost surely a mistake."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest

from rlcore.config import validate_config
from rlcore.errors import ConfigError, RlcoreWarning
from rlcore_recipes.dapo import DAPOConfig
from rlcore_recipes.grpo import GRPOConfig
from rlcore_recipes.ppo import PPOConfig
from rlcore_recipes.settings.combinations import COMBINATIONS

RAY = {"kind": "ray", "pools": {"train": {}, "gen": {}}, "placement": {"actor": "train", "rollout": "gen"}}
ASYNC = {"controller": RAY, "async": {"max_staleness": 1}}


def config_of(cls: type = GRPOConfig, objective: Any = None, actor: Any = None, **changes: Any) -> Any:
    values = {
        "model": {"path": "m"},
        "data": {"train_files": "t", "train_batch_size": 4, "max_response_length": 512},
        "reward": {"path": "r.py:f"},
        "trainer": {"out_dir": "o", "total_steps": 2},
        "actor": {"objective": objective or {}, **(actor or {})},
        **changes,
    }
    return validate_config(cls, values)


def dr_grpo(max_length: int) -> dict[str, Any]:
    return {"aggregation": {"name": "seq-mean-token-sum-norm", "max_length": max_length}}


BY_SEQUENCE = {"aggregation": "seq-mean-token-mean"}
MIS = {"name": "mis", "level": "geometric"}
# name of the combination → configurations it is found in, and one close to them that is fine
DOUBTFUL: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "sequence_ratio_by_tokens": (
        [{"objective": {"policy_loss": "gspo"}}, {"objective": {"policy_loss": "gmpo", **dr_grpo(512)}}],
        {"objective": {"policy_loss": "gspo", **BY_SEQUENCE}},
    ),
    "sequence_clip_for_tokens": (
        [{"objective": {"policy_loss": {"name": "gspo", "clip_low": 0.2, "clip_high": 0.28}, **BY_SEQUENCE}}],
        {"objective": {"policy_loss": {"name": "gspo", "clip_high": math.inf}, **BY_SEQUENCE}},  # no bound
    ),
    "mean_of_token_advantages": (
        [
            {"cls": PPOConfig, "objective": {"policy_loss": "gmpo", **BY_SEQUENCE}},
            {
                "objective": {"policy_loss": "gmpo", **BY_SEQUENCE},
                "algorithm": {"advantage": "reinforce_plus_plus", "kl_in_reward": {}},
            },
        ],
        {"objective": {"policy_loss": "gmpo", **BY_SEQUENCE}, "algorithm": {"kl_in_reward": {}}},
    ),
    "gpg_with_a_ratio": (
        [{"algorithm": {"advantage": "gpg"}}],
        {"algorithm": {"advantage": "gpg"}, "objective": {"policy_loss": "gpg"}},
    ),
    "off_policy_without_a_ratio": (
        [
            {"objective": {"policy_loss": "reinforce"}, "actor": {"mini_batch_size": 2}},
            {"objective": {"policy_loss": "gpg", "correction": "tis"}, "actor": {"epochs": 2}},
            {"objective": {"policy_loss": "gpg"}, "actor": {"old_logprobs": "rollout"}, **ASYNC},
        ],
        {
            "objective": {"policy_loss": "reinforce", "correction": "tis"},
            "actor": {"mini_batch_size": 2, "old_logprobs": "rollout"},
        },
    ),
    "asynchronous_without_correction": (
        [ASYNC, {**ASYNC, "objective": {"policy_loss": "reinforce"}}],
        {**ASYNC, "actor": {"old_logprobs": "rollout"}},
    ),
    "kl_loss_without_gradient": (
        [{"objective": {"kl_loss": {"coeff": 0.1, "estimator": "k1"}}}],
        {"objective": {"kl_loss": {"coeff": 0.1, "estimator": "k1+"}}},
    ),
    "constant_length": ([{"objective": dr_grpo(1024)}], {"objective": dr_grpo(512)}),
    "ratios_of_truncated_samples": (
        [
            {"rollout": {"top_p": 0.9}, "objective": {"correction": "tis"}},
            {"rollout": {"top_k": 50}, "actor": {"old_logprobs": "rollout"}},
            {"rollout": {"min_p": 0.1}, "actor": {"mini_batch_size": 2}},
        ],
        {"rollout": {"top_p": 0.9, "validation": {"top_p": 0.7}}},
    ),
    "geometric_mean_with_token_bounds": (
        [{"objective": {"correction": MIS}}],
        {"objective": {"correction": {**MIS, "low": 0.99, "high": 1.01}}},
    ),
    "unused_reference": (
        [{"ref": {"model": {"path": "other"}}}],
        {"ref": {"model": {"path": "other"}}, "objective": {"kl_loss": {"coeff": 0.1}}},
    ),
}


def test_every_combination_has_an_example() -> None:
    assert set(DOUBTFUL) == {combination.__name__ for combination in COMBINATIONS}


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda combination: combination.__name__)
def test_a_doubtful_combination_is_named_and_a_close_one_is_not(combination: Any) -> None:
    examples, fine = DOUBTFUL[combination.__name__]
    for example in examples:
        config = config_of(**example)
        found = list(combination(config))
        assert list(config.doubts()) == found, "no other combination is found in the example"
        ((key, why),) = found
        section: Any = config
        for name in key.split("."):  # the key exists, or is a parameter of a choice
            section = getattr(section.params if hasattr(section, "params") else section, name)
        assert len(why) > 40
    assert not list(config_of(**fine).doubts())


@pytest.mark.parametrize("cls", [GRPOConfig, PPOConfig, DAPOConfig])
def test_defaults_are_not_doubtful(cls: type) -> None:
    overlong = {"algorithm": {"overlong": {"buffer": 128}}} if cls is DAPOConfig else {}
    assert not list(config_of(cls, **overlong).doubts())


def test_a_doubt_is_a_warning_and_shown_once() -> None:
    config = config_of(objective={"policy_loss": "gspo"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        config.warn_of_doubts()
        config.warn_of_doubts()
    assert [one.category for one in caught] == [RlcoreWarning]
    assert "actor.objective.aggregation: token-mean gives long completions more weight" in str(caught[0].message)


SECOND_TIME = r"objective.correction: weighs samples a second time"


@pytest.mark.parametrize("correction", ["tis", "icepop", "mis", {"name": "mis", "level": "sequence"}])
@pytest.mark.parametrize("loss", ["ppo", "gspo", "gmpo", "cispo", "sapo"])
def test_one_ratio_does_not_weigh_twice(loss: str, correction: Any) -> None:
    with pytest.raises(ConfigError, match=SECOND_TIME):
        config_of(objective={"policy_loss": loss, "correction": correction}, actor={"old_logprobs": "rollout"})


@pytest.mark.parametrize(
    ("loss", "correction"), [("ppo", {"name": "mis", "weight": "one"}), ("reinforce", "tis"), ("gpg", "mis")]
)
def test_corrections_that_fit_the_rollouts_log_probs(loss: str, correction: Any) -> None:
    config_of(objective={"policy_loss": loss, "correction": correction}, actor={"old_logprobs": "rollout"})


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_plus_plus_baseline", "opo", "gpg", "pass_at_k"])
@pytest.mark.parametrize("cls", [GRPOConfig, PPOConfig])
def test_single_completions_are_not_compared(cls: type, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout.n: is 1, and {name} compares .*gae \(recipe ppo\), rei.*, remax"):
        config_of(cls, algorithm={"advantage": name}, rollout={"n": 1})


@pytest.mark.parametrize(
    ("cls", "name"), [(PPOConfig, "gae"), (GRPOConfig, "reinforce_plus_plus"), (GRPOConfig, "remax")]
)
def test_estimators_for_single_completions(cls: type, name: str) -> None:
    assert config_of(cls, algorithm={"advantage": name}, rollout={"n": 1}).rollout.n == 1
