"""Other roles take the policy's engine and options, so that a run needs no engine that it does not use."""

from __future__ import annotations

from typing import Any

import pytest

from rlcore import plugins
from rlcore.config import validate_config
from rlcore.engines.settings import adapter_rank
from rlcore.errors import ConfigError


def configuration(recipe: str, **sections: Any) -> Any:
    values: dict[str, Any] = {
        "model": {"path": "model"},
        "data": {"train_files": ["a.parquet"]},
        "trainer": {"out_dir": "out"},
        **sections,
    }
    if recipe != "sft":
        values["data"] |= {"max_prompt_length": 8, "max_response_length": 512}
        values["reward"] = {"name": "gsm8k"}
    return validate_config(plugins.get("rlcore.recipes", recipe).config_class(), values)


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "dapo", "sft"])
def test_no_other_training_engine_needs_to_be_installed(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plugins._points
    monkeypatch.setattr(plugins, "_points", lambda group: {k: v for k, v in found(group).items() if k != "fsdp"})
    config = configuration(recipe, actor={"engine": "megatron", "megatron": {"tensor_parallel": 2}})
    for role in ("ref", "critic"):
        if hasattr(config, role):
            assert getattr(config, role).engine_with(config.actor) == ("megatron", config.actor.options)


def test_roles_take_the_policys_options_but_not_its_adapters() -> None:
    config = configuration("ppo", actor={"fsdp": {"device": "cpu", "lora": {"rank": 4}}})
    assert adapter_rank(config.actor.options) == 4
    for role in (config.ref, config.critic):
        name, options = role.engine_with(config.actor)
        assert name == "fsdp"
        assert options.device == "cpu"
        assert adapter_rank(options) is None


def test_a_section_or_an_engine_of_a_role_comes_first() -> None:
    config = configuration(
        "ppo",
        actor={"fsdp": {"device": "cpu", "offload_params": True}},
        critic={"fsdp": {"lora": {"rank": 2}}},
        ref={"engine": "megatron"},
    )
    _, options = config.critic.engine_with(config.actor)
    assert adapter_rank(options) == 2
    assert not options.offload_params
    assert config.ref.engine_with(config.actor) == ("megatron", config.ref.options)


@pytest.mark.parametrize("role", ["ref", "reward_model"])
def test_a_frozen_model_trains_no_adapters(role: str) -> None:
    sections = {role: {"model": {"path": "other"}, "fsdp": {"lora": {"rank": 2}}}}
    with pytest.raises(ConfigError, match=rf"{role}.fsdp.lora: a frozen model trains no adapters"):
        configuration("grpo", **sections)


@pytest.mark.parametrize(
    ("ref", "key"),
    [
        ({"offload": True}, "offload"),
        ({"max_tokens_per_micro_batch": 512}, "max_tokens_per_micro_batch"),
        ({"engine": "megatron"}, "engine"),
        ({"fsdp": {"offload_params": True}}, "fsdp"),
    ],
)
def test_keys_of_a_reference_that_is_the_actor_are_refused(ref: dict[str, Any], key: str) -> None:
    actor = {"fsdp": {"lora": {"rank": 4}}, "objective": {"kl_loss": {"coeff": 0.1}}}
    with pytest.raises(ConfigError, match=f"ref.{key}: is for a reference engine, and there is none") as error:
        configuration("grpo", actor=actor, ref=ref)
    assert str(error.value).count("ref.") == 2, "the key once, and the remedy"
    assert "ref" in configuration("grpo", actor=actor, ref={**ref, "model": {"path": "other"}}).roles
    assert "ref" not in configuration("grpo", actor=actor).roles
    configuration("grpo", actor={"fsdp": {"lora": {"rank": 4}}}, ref=ref)  # no reference takes part
