"""Errors: one sentence each, before anything is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlcore import plugins
from rlcore.engines import ModelSettings, OptimSettings, TrainEngineSpec
from rlcore.engines.settings import names_a_folder
from rlcore.errors import CheckpointError, EngineError
from rlcore_fsdp.attention import choose_kernel
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.model_folder.loading import load_model, read_config
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.training.logprob_head import LogitsRule
from rlcore_kit.training.lr_schedule import learning_rate


def make_engine(path: Path | str, options: dict[str, Any] | None = None, **overrides: Any) -> FSDPTrainEngine:
    settings = ModelSettings(path=str(path), attn_implementation=overrides.pop("attn_implementation", None))
    return build(TrainEngineSpec(settings, FSDPSettings(**(options or {"device": "cpu"})), **overrides))


def test_the_plugin_is_found_without_importing_torch() -> None:
    program = (
        "import sys; from rlcore import plugins; "
        "assert plugins.get('rlcore.train_engines', 'fsdp').config_class().__name__ == 'FSDPSettings'; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_plugin_builds_the_engine(tiny_model_path: Path) -> None:
    spec = TrainEngineSpec(ModelSettings(path=str(tiny_model_path)), FSDPSettings(device="cpu"))
    assert isinstance(plugins.get("rlcore.train_engines", "fsdp").build(spec), FSDPTrainEngine)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"param_dtype": "float32", "master_dtype": "bfloat16"}, "narrower"),
        ({"offload_params": True, "offload_optimizer": True}, "only one"),
        ({"param_dtype": "float16"}, "bfloat16"),
        ({"replicate": 0}, "greater than or equal to 1"),
        ({"shards": 2}, "shards"),
    ],
)
def test_impossible_settings_are_refused_when_built(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        FSDPSettings(**options)


def test_cuda_is_refused_where_there_is_none(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no CUDA device"):
        make_engine(tiny_model_path, {"device": "cuda"})
    assert make_engine(tiny_model_path, {"device": None}).device == torch.device("cpu")


def test_more_replicas_than_processes_are_refused(tiny_model_path: Path) -> None:
    with pytest.raises(EngineError, match="replicate 2 needs that many processes"):
        make_engine(tiny_model_path, {"device": "cpu", "replicate": 2})


def test_unknown_or_unusable_attention_is_refused(tiny_model_path: Path) -> None:
    with pytest.raises(EngineError, match="'flash' has no packed form here; known: flash_attention_2, varlen, sdpa"):
        make_engine(tiny_model_path, attn_implementation="flash")
    with pytest.raises(EngineError, match="'flash_attention_2' needs CUDA"):
        make_engine(tiny_model_path, attn_implementation="flash_attention_2")
    assert choose_kernel(None, torch.device("cpu"), torch.bfloat16) == "sdpa"


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(EngineError, match="model folder runs/modle does not exist"):
        make_engine("runs/modle")
    assert all(map(names_a_folder, ("runs", "/runs", "./x", "a/b/c")))
    assert not any(map(names_a_folder, ("gpt2", "org/name")))


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"model folder /.*nowhere does not exist"):
        make_engine(tmp_path / "nowhere")
    with pytest.raises(EngineError, match=r"has no config\.json"):
        make_engine(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(EngineError, match=r"has no weights"):
        make_engine(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for head in ("policy", "score"):
        with pytest.raises(EngineError, match=r"model\.safetensors is damaged"):
            make_engine(tmp_path, head=head)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(EngineError, match=r"cannot be read"):
        make_engine(tmp_path)


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_model(tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineError, match=r"lack 1 tensors of Qwen2ForCausalLM, first model\.layers\.1\.mlp"):
        make_engine(path)


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("Bloom", {}, "does not support replaceable attention"),
        ("Qwen3Next", {"num_hidden_layers": 4}, "linear_attention layers, which mix the sequences"),
        ("Gemma2", {"head_dim": 8}, "uses softcap in attention"),
        ("GptOss", {"head_dim": 8, "num_local_experts": 4}, "uses s_aux in attention"),
    ],
)
def test_architectures_that_cannot_be_packed_are_refused(
    tmp_path: Path, architecture: str, options: dict[str, Any], words: str
) -> None:
    path = tiny_model(tmp_path, architecture=architecture, **options)
    with pytest.raises(EngineError, match=words):
        make_engine(path)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("Granite", {"logits_scaling": 4.0}), ("Cohere", {"logit_scale": 0.3}), ("Phi3", {}), ("Mixtral", {})],
)
def test_architectures_are_verified_when_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, options: dict[str, Any]
) -> None:
    path = tiny_model(tmp_path, architecture=architecture, **options)
    make_engine(path)
    if architecture == "Granite":  # a rule that we do not know is noticed
        monkeypatch.setattr("rlcore_fsdp.packed_model.logits_rule", lambda config: LogitsRule())
        with pytest.raises(EngineError, match="packed outputs differ from those of transformers"):
            make_engine(path)


def test_a_manifest_with_too_few_rows_is_refused(tmp_path: Path, tiny_model_path: Path) -> None:
    engine = make_engine(tiny_model_path)
    engine.save(tmp_path)
    file = tmp_path / "checkpoint.json"
    manifest = json.loads(file.read_text())
    del manifest["ranks"][0]["weight/model.norm.weight"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"names 0 rows of weight/model\.norm\.weight"):
        engine.load(tmp_path)
    del manifest["adam_steps"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged: adam_steps: Field required"):
        engine.load(tmp_path)


def test_folders_that_cannot_be_written_are_reported(tmp_path: Path, tiny_model_path: Path) -> None:
    engine = make_engine(tiny_model_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="could not be written"):
        engine.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be written"):
        engine.save(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_head_that_the_architecture_does_not_have_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, architecture="Olmo2")
    with pytest.raises(EngineError, match="AutoModelForTokenClassification"):
        make_engine(path, head="value")


def test_a_reward_model_with_a_bias_keeps_it(tmp_path: Path) -> None:
    """A score head reads sequence classifiers (without bias) and token classifiers (with bias)."""
    critic = make_engine(tiny_model(tmp_path / "base"), head="value")
    critic.model.score.bias.data.fill_(3.0)
    critic.save_pretrained(tmp_path / "critic")
    reward = make_engine(tmp_path / "critic", head="score")
    assert float(reward.model.score.bias) == 3.0
    plain = make_engine(tiny_model(tmp_path / "plain", head="score"), head="score")
    assert type(plain.model).__name__ == "Qwen2ForSequenceClassification"
    assert plain.model.score.bias is None


def test_building_an_engine_changes_no_random_state(tiny_model_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    make_engine(tiny_model_path, head="value", optim=OptimSettings())
    assert torch.equal(torch.rand(2), expected)


def test_loading_is_silent(tiny_model_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ModelSettings(path=str(tiny_model_path))
    load_model(settings, read_config(settings), "value", torch.float32, 0, "sdpa")
    assert capfd.readouterr() == ("", "")


def test_learning_rates_follow_the_schedule() -> None:
    linear = OptimSettings(lr=1.0, schedule="linear", warmup_steps=2, total_steps=6, min_lr_ratio=0.2)
    expected = [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert [learning_rate(step, linear) for step in range(8)] == pytest.approx(expected)
    by_share = linear.model_copy(update={"warmup_steps": 0, "warmup_ratio": 0.4})  # 2 of 6
    assert [learning_rate(step, by_share) for step in range(8)] == pytest.approx(expected)
    cosine = OptimSettings(lr=2.0, schedule="cosine", total_steps=4)
    assert [learning_rate(step, cosine) for step in range(5)] == pytest.approx([2.0, 1.7071068, 1.0, 0.2928932, 0.0])
    constant = OptimSettings(lr=3.0, warmup_steps=3)
    assert [learning_rate(step, constant) for step in range(4)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
