"""Damaged model folders are reported in one sentence; failed exports keep the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlcore.engines import ModelSettings, TrainEngineSpec
from rlcore.errors import EngineError
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.model_folder.writing import write_model_folder
from rlcore_kit.testing.model_folders import edited
from rlcore_kit.testing.tiny_model import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def make_engine(path: Path, **overrides: Any) -> FSDPTrainEngine:
    return build(TrainEngineSpec(ModelSettings(path=str(path)), FSDPSettings(device="cpu"), **overrides))


def refused(path: Path) -> str:
    with pytest.raises(EngineError) as caught:
        make_engine(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "nope"},
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"hidden_size": 0},
        {"hidden_size": "x"},
        {"hidden_size": 48},
        {"hidden_size": 10**5},
        {"num_hidden_layers": 10**5, "layer_types": None},
        {"num_labels": 10**9},
        {"max_position_embeddings": -1},
        {"rms_norm_eps": float("nan")},
        {"vocab_size": 0},
        {"vocab_size": None},
        {"num_hidden_layers": 1.5},
        {"rms_norm_eps": "tiny"},
        {"pad_token_id": 10**6},
        {"layer_types": ["nope", "nope"]},
        {"model_type": ["qwen2"]},
        {"dtype": "floot"},
        {"eos_token_id": "x"},
        {"eos_token_id": True},
        {"eos_token_id": [1, -1]},
    ],
    ids=str,
)
def test_contradictory_configurations_are_refused(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    refused(edited(model, tmp_path / "model", config=changes))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"eos_token_id": 1' + b"0" * 5000 + b"}"],
    ids=lambda content: str(content[:8]),
)
def test_files_without_a_json_object_are_refused(model: Path, tmp_path: Path, name: str, content: bytes) -> None:
    path = edited(model, tmp_path / "model")
    (path / name).write_bytes(content)
    assert name in refused(path)


def test_only_regular_files_are_read(model: Path, tmp_path: Path) -> None:
    path = edited(model, tmp_path / "model")
    file = path / "generation_config.json"
    file.unlink()
    os.mkfifo(file)  # would wait for a writer
    assert "generation_config.json is not a regular file" in refused(path)
    file.unlink()
    file.symlink_to("nowhere")
    assert "generation_config.json is not a regular file" in refused(path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "is not an index of weights"),
        ({"weight_map": ["a"]}, "is not an index of weights"),
        ({"weight_map": {"a": 3}}, "is not an index of weights"),
        ({"weight_map": {"a": "model.safetensors"}}, 'index.json has no "metadata"'),
        ({"weight_map": {"a": "../model.safetensors"}, "metadata": {}}, "not a file of its folder"),
        ({"weight_map": {"a": "b.safetensors"}, "metadata": {}}, "has no file b.safetensors, which"),
    ],
)
def test_an_index_that_names_missing_files_is_refused(
    model: Path, tmp_path: Path, index: dict[str, Any], words: str
) -> None:
    path = edited(model, tmp_path / "model", files={"model.safetensors.index.json": json.dumps(index)})
    (path / "model.safetensors").unlink()
    assert words in refused(path)


def test_a_folder_with_only_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    path = edited(model, tmp_path / "model", files={"adapter_config.json": "{}"})
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    assert "merge the adapter into its base model" in refused(path)


def test_a_failing_export_keeps_the_weights(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, out = make_engine(model), tmp_path / "out"
    engine.save_pretrained(out)

    def fail(*_: Any) -> None:
        raise ValueError("cannot be\nwritten")

    monkeypatch.setattr("rlcore_fsdp.engine.write_others", fail)
    engine.model.get_input_embeddings().weight.data.fill_(2.0)
    with pytest.raises(EngineError, match=r"the weights are in .*out, but .*ValueError: written; copy config\.json"):
        engine.save_pretrained(out)
    assert bool((load_file(out / "model.safetensors")["model.embed_tokens.weight"] == 2).all())
    assert not (out / "config.json").exists(), "a folder with a configuration is complete"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_without_tensors_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no weights to write"):
        write_model_folder([], tmp_path / "out", lambda folder, names: None)
    assert not list(tmp_path.iterdir())


def test_large_models_are_written_in_several_files(tmp_path: Path) -> None:
    weights = {f"layer.{number}": torch.full((10,), float(number)) for number in range(5)}
    write_model_folder(weights.items(), tmp_path / "out", lambda folder, names: None, max_file_bytes=80)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"].values()) == ["model-00001-of-00003.safetensors"] * 2 + [
        "model-00002-of-00003.safetensors"
    ] * 2 + ["model-00003-of-00003.safetensors"]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], weights[name])
