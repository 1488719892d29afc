"""What holds for every key of every recipe, with every backend and plugin that is installed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter, ValidationError

from rlcore import plugins
from rlcore.config import Config, Unlimited, dump_config, load_config, missing_packages
from rlcore.config.keys import sections
from rlcore.config.schema import file_schema
from rlcore.config.values import is_path, is_text, plain_types
from rlcore.config.yaml_format import parse
from rlcore.errors import ConfigError

ROOT = Path(__file__).parent.parent
RECIPES = plugins.names("rlcore.recipes")
PLACES = ("path", "dir", "file", "files", "folder")
NO_PATHS = {"data_source_key"}


@cache
def models() -> list[type[Config]]:
    found: dict[type[Config], None] = {}
    for recipe in RECIPES:
        for section in sections(plugins.get("rlcore.recipes", recipe).config_class()):
            if section.model is not None:
                found[section.model] = None
    return list(found)


def fields() -> Iterator[tuple[type[Config], str, Any]]:
    for model in models():
        for name, field in model.model_fields.items():
            yield model, name, field


def refusal(model: type[Config], name: str, value: Any) -> str | None:
    """What validation says of one value of one key; None if it says nothing."""
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return next((detail["msg"] for detail in error.errors() if detail["loc"][:1] == (name,)), None)
    return None


def test_the_walk_reaches_every_package() -> None:
    packages = {model.__module__.partition(".")[0] for model in models()}
    assert packages >= {"rlcore", "rlcore_fsdp", "rlcore_recipes", "rlcore_rewards"}
    assert len(list(fields())) > 200


def test_floats_are_finite_unless_infinity_switches_a_limit_off() -> None:
    unlimited = set()
    for model, name, field in fields():
        if float not in plain_types(field.annotation):
            continue
        for value in (math.nan, math.inf, -math.inf):
            if refusal(model, name, value) is None:
                assert not math.isnan(value), f"{model.__name__}.{name} takes {value}"
                unlimited.add(name)
    assert unlimited == {"cap", "high", "low", "clip_low", "clip_high", "max_weight", "min_score"}
    assert TypeAdapter(Unlimited).validate_python(math.inf) == math.inf


@pytest.mark.parametrize("value", [2**63, 10**30, -(2**63), True, b"8", [[[]]], {"a": {1: 2}}], ids=str)
def test_numbers_and_text_refuse_what_is_neither(value: Any) -> None:
    for model, name, field in fields():
        kinds = plain_types(field.annotation)
        number = {int, float} & set(kinds) and not {bool, dict} & set(kinds)
        if float in kinds and type(value) is int:
            continue  # a finite number
        if number or is_text(field.annotation):
            assert refusal(model, name, value) is not None, f"{model.__name__}.{name} takes {value!r}"


def test_counts_that_are_multiplied_have_upper_bounds() -> None:
    for model, name, _ in fields():
        if name in ("n", "workers", "processes", "replicas", "tensor_parallel_size", "tp_size"):
            assert refusal(model, name, 10**9) is not None, f"{model.__name__}.{name}"


def test_every_key_that_names_a_place_expands_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/somewhere")
    found = []
    for model, name, field in fields():
        if name.rpartition("_")[2] in PLACES and name not in NO_PATHS:
            assert is_path(field.annotation, field.metadata), f"{model.__name__}.{name} is no FilePath or FileName"
            found.append(name)
    assert {"path", "out_dir", "checkpoint_dir", "train_files", "weights_dir", "folder", "tokenizer_path"} <= set(found)


def test_every_key_has_a_description() -> None:
    for model, name, field in fields():
        assert field.description, f"{model.__name__}.{name}"


def test_lists_take_a_single_value() -> None:
    for model, name, field in fields():
        annotation = field.annotation
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if get_origin(annotation) is list and refusal(model, name, ["x"]) is None:
            assert refusal(model, name, "x") is None, f"{model.__name__}.{name}"


def test_a_function_by_its_path_replaces_the_reward_of_every_shipped_configuration() -> None:
    for recipe in RECIPES:
        plugin = plugins.get("rlcore.recipes", recipe)
        model = plugin.config_class()
        for file in plugin.ready_made().values() if "reward" in model.model_fields else ():
            words = ["reward.path=my_reward.py:compute_score"]
            words += ["trainer.test_freq=-1"] if model.model_fields["reward"].is_required() else []
            config: Any = load_config(model, file, words)
            assert (config.reward.name, config.reward.options.path) == ("function", "my_reward.py:compute_score")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.stop=['']", "rollout.stop.0: must have at least 1 character"),
        *(
            (f"data.chat_template_kwargs.{name}=x", f"data.chat_template_kwargs.{name}: is set by rlcore")
            for name in ("messages", "tokenize", "chat_template", "add_generation_prompt")
        ),
        ("trainer.total_steps=1e400", "trainer.total_steps: must be a finite number, not .inf"),
        ("actor.optim.lr=1e400", "actor.optim.lr: must be a finite number, not .inf"),
        ("trainer.checkpoint_dir=~no-such-user/x", "there is no home folder ~no-such-user"),
        ("temperature=1", "temperature: unknown key; did you mean rollout.temperature or rollout.validation.temper"),
        ("weight_decay=0", "weight_decay: unknown key; did you mean actor.optim.weight_decay?"),
        ("actor.lr=1", "actor.lr: unknown key; did you mean actor.optim.lr?"),
        ("algorithm.advantage=gspo", "gspo is a value of actor.objective.policy_loss"),
        ("rollout.engine=fsdp", "fsdp is a value of actor.engine"),
        ("actor.fsdp.param_dtype=bfloat", "did you mean bfloat16 or float32?"),
        (f"trainer.trackers={'x' * 100_000}", "unknown tracker 'xxx"),
    ],
)
def test_values_that_a_shipped_configuration_refuses(override: str, message: str) -> None:
    plugin = plugins.get("rlcore.recipes", "grpo")
    with pytest.raises(ConfigError) as raised:
        load_config(plugin.config_class(), plugin.ready_made()["grpo_gsm8k"], [override])
    assert message in str(raised.value)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("key", ["trainer.log_rollouts", "rollout.n"])
def test_sft_refuses_keys_about_completions_that_it_does_not_generate(key: str) -> None:
    plugin = plugins.get("rlcore.recipes", "sft")
    with pytest.raises(ConfigError, match=key.removesuffix(".n")):
        load_config(plugin.config_class(), next(iter(plugin.ready_made().values())), [f"{key}=3"])


def test_every_package_that_a_configuration_needs_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlcore.packages.find_spec", lambda module: None)
    plugin = plugins.get("rlcore.recipes", "grpo")
    overrides = [
        "actor.fsdp.lora.rank=8",
        "rollout.engine=vllm",
        "reward.name=math",
        "trainer.trackers=[console, wandb, tensorboard, swanlab, mlflow, trackio]",
        "trainer.checkpoint_dir=s3://bucket/run",
        "trainer.resume=gs://bucket/run",
        "model.attn_implementation=flash_attention_2",
        "rollout.sglang.tp_size=2",  # not named: not needed
    ]
    config = load_config(plugin.config_class(), plugin.ready_made()["grpo_gsm8k"], overrides)
    assert dict(missing_packages(config)).keys() == {
        "actor.fsdp.lora",
        "rollout.vllm",
        "reward.math",
        "trainer.wandb",
        "trainer.tensorboard",
        "trainer.swanlab",
        "trainer.mlflow",
        "trainer.trackio",
        "trainer.checkpoint_dir",
        "trainer.resume",
        "model.attn_implementation",
    }
    server = [*overrides, "rollout.vllm.mode=server", "rollout.vllm.server.urls=http://127.0.0.1:8000"]
    config = load_config(plugin.config_class(), plugin.ready_made()["grpo_gsm8k"], server)
    assert "rollout.vllm" not in dict(missing_packages(config)), "a client of servers needs no vllm"


@cache
def schema_of(recipe: str) -> Draft202012Validator:
    schema = json.loads(json.dumps(file_schema(plugins.get("rlcore.recipes", recipe).config_class())))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def complaints(recipe: str, values: Any) -> list[str]:
    return [
        f"{'.'.join(map(str, error.path))}: {error.message:.200}" for error in schema_of(recipe).iter_errors(values)
    ]


SHIPPED = [
    *((recipe, path) for recipe in RECIPES for path in plugins.get("rlcore.recipes", recipe).ready_made().values()),
    *(("grpo", ROOT / "examples" / name) for name in ("tiny.yaml", "cluster/grpo_two_pools.yaml")),
]


@pytest.mark.parametrize(("recipe", "path"), SHIPPED, ids=lambda value: getattr(value, "stem", value))
def test_the_schema_accepts_every_shipped_file_and_what_it_resolves_to(recipe: str, path: Path) -> None:
    assert complaints(recipe, parse(path.read_text(), str(path))[0]) == []
    if path.parent.name == recipe:  # the examples leave keys to the command line
        config = load_config(plugins.get("rlcore.recipes", recipe).config_class(), path)
        assert complaints(recipe, yaml.safe_load(dump_config(config))) == []


def test_the_schema_accepts_every_sample_of_the_documentation() -> None:
    seen = 0
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")]:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            values = parse(block, page.name)[0]
            known = {recipe: set(schema_of(recipe).schema["properties"]) for recipe in RECIPES}
            fitting = [name for name in RECIPES if set(values) <= known[name]]
            if not fitting or "…" in block:
                continue
            assert not all(complaints(recipe, values) for recipe in fitting), f"{page.name}:\n{block}"
            seen += 1
    assert seen > 5


@pytest.mark.parametrize("value", ["x", "null", "8", 1, 0.5, True, None, ["x"], [0.5], {}], ids=repr)
def test_the_schema_accepts_what_the_loader_accepts(value: Any) -> None:
    for section in sections(plugins.get("rlcore.recipes", "dapo").config_class()):
        parts = section.path.split(".") if section.path else []
        if section.model is None or re.search(r"[<\[]", section.path):
            continue
        for name in section.model.model_fields:
            if refusal(section.model, name, value) is None:
                document: Any = {name: value}
                for part in reversed(parts):
                    document = {part: document}
                assert complaints("dapo", document) == [], f"{section.path}.{name}={value!r}"


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1},
        {"actor": {"optim": {"lr": "fast"}}},
        {"actor": {"optim": {"lrr": 1}}},
        {"actor": {"fsdp": {"lora": {"rank": 0}}}},
        {"algorithm": {"advantage": "gspo"}},
        {"algorithm": {"advantage": {"name": "rloo", "normalize_std": True}}},
        {"data": {"train_files": [1]}},
        {"defaults": 3},
    ],
)
def test_the_schema_still_refuses(values: Any) -> None:
    assert complaints("grpo", values)
