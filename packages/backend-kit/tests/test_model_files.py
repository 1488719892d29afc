"""The files of a model folder are read and checked; `generation_config.json` has priority over `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlcore.engines import ModelSettings
from rlcore.errors import EngineError
from rlcore_kit.model_folder.checks import check_tensors, not_ignored
from rlcore_kit.model_folder.files import EndTokens, Tensor, end_tokens


def folder(path: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelSettings:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return ModelSettings(path=str(path))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, EndTokens((), None)),
        ({"eos_token_id": 3}, None, EndTokens((3,), "config.json")),
        ({"eos_token_id": 3}, {}, EndTokens((3,), "config.json")),
        ({"eos_token_id": 3}, {"eos_token_id": [5, 3, 5]}, EndTokens((5, 3), "generation_config.json")),
        ({"text_config": {"eos_token_id": 4}}, None, EndTokens((4,), "config.json")),
    ],
)
def test_generation_settings_have_priority(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: EndTokens
) -> None:
    assert end_tokens(folder(tmp_path, config, generation), 10) == expected


@pytest.mark.parametrize("value", [-1, 10, [], [3, 10], "3", True, 3.0, {}])
def test_end_tokens_must_be_tokens_of_the_model(tmp_path: Path, value: Any) -> None:
    """Both files are checked, whichever has priority."""
    for config, generation in (({"eos_token_id": value}, {"eos_token_id": 3}), ({}, {"eos_token_id": value})):
        with pytest.raises(EngineError, match=r"eos_token_id is .* must be a token of the model \(0 to 9\)"):
            end_tokens(folder(tmp_path, config, generation), 10)


def test_patterns_of_ignored_weights() -> None:
    names = {"model.layers.1.a", "model.layers.10.a", "vision.b"}
    assert not_ignored(names, ("model.layers.1.*",)) == ["model.layers.10.a", "vision.b"]
    assert not_ignored(names, ("*",)) == []


@pytest.mark.parametrize("name", ["a.weight", "a.bias"])
def test_integer_parameters_are_refused(tmp_path: Path, name: str) -> None:
    found = {each: Tensor(tmp_path / "model.safetensors", "I32", (1,)) for each in ("a.position_ids", name)}
    with pytest.raises(EngineError, match=rf"weights of 'm': {name} holds integers \(I32\)"):
        check_tensors(ModelSettings(path="m"), found, "policy")
    del found[name]  # what is left is a buffer
    check_tensors(ModelSettings(path="m"), found, "policy")
