"""`rlcore export`: a checkpoint of any layout becomes the model folder that its own run writes."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlcore import plugins
from rlcore.cli.command_tree import cli
from rlcore.engines import ModelSettings, TrainEngineSpec
from rlcore.errors import EngineError
from rlcore_fsdp.engine import build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_recipes.export import model_folder
from rlcore_recipes.export.model_folder import ExportOptions
from rlcore_recipes.export.source import find_checkpoint

RUN = {"trainer.total_steps": 2, "trainer.save_freq": 1, "trainer.save_hf": True, "trainer.keep_checkpoints": 3}
SFT = dict.fromkeys(
    ["data.max_response_length", "data.max_prompt_length", "rollout.n", "reward.path", "reward.workers"]
)
LAYOUTS: list[dict[str, Any]] = [
    {"tensor_parallel": 2},
    {"pipeline_parallel": 2, "checkpoint_format": "torch_dist"},
    {"lora": {"rank": 4}, "tensor_parallel": 2, "dtype": "bfloat16"},
]


def run_on_two_ranks(task: Any, recipe: str, folder: Path, changes: dict[str, Any]) -> Path:
    for rank in task.fork(recipe, folder, {**RUN, **changes}, processes=2):
        output, _ = rank.communicate(timeout=240)
        assert rank.returncode == 0, output
    return folder


@pytest.fixture(scope="module")
def fsdp(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of PPO on two ranks, whose first checkpoint is its best."""
    best = {"trainer.test_freq": 1, "trainer.best_metric": "train/none", "actor.optim.lr": 1e-3}
    folder = run_on_two_ranks(task, "ppo", tmp_path_factory.mktemp("export") / "fsdp", best)
    metrics = {"step-000001": 2.0, "step-000002": 1.0}
    for name, value in metrics.items():
        file = folder / "checkpoints" / name / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {"train/none": value}}))
    return folder


@pytest.fixture(scope="module")
def lora(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains adapters and stores checkpoints at a URL; its frozen weights are bfloat16."""
    folder = tmp_path_factory.mktemp("export") / "lora"
    url = f"local://{folder}-remote"
    options = {"device": "cpu", "param_dtype": "bfloat16", "lora": {"rank": 4, "alpha": 8}}
    result = task.run(
        "grpo", folder, {**RUN, "actor.fsdp": options, "actor.optim.lr": 1e-2, "trainer.checkpoint_dir": url}
    )
    assert result.exit_code == 0, result.output
    return folder


def export(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["export", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def files_of(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".jinja")}


def test_two_ranks_become_the_model_that_the_run_wrote(fsdp: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    printed = export(fsdp, "--out", out)
    assert f"{out}: actor after step 2 of {fsdp}/checkpoints/step-000002\n" in printed
    assert f"vllm serve {out}\n" in printed
    assert f"python3 -m sglang.launch_server --model-path {out}\n" in printed
    assert_same(weights(out), weights(fsdp / "model"))
    assert files_of(out) == files_of(fsdp / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(out)
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_step_precision_and_size_of_files(fsdp: Path, tmp_path: Path) -> None:
    earlier, best, narrow = (tmp_path / name for name in ("earlier", "best", "narrow"))
    export(fsdp / "checkpoints" / "step-000001", "--out", earlier)
    export(fsdp, "--best", "--out", best)
    assert_same(weights(best), weights(earlier))
    last = weights(fsdp / "model")
    assert any(not torch.equal(last[name], tensor) for name, tensor in weights(earlier).items())
    export(fsdp / "checkpoints", "--step", 2, "--dtype", "bf16", "--max-shard-size", "1MiB", "--out", narrow)
    assert_same(weights(narrow), {name: tensor.bfloat16() for name, tensor in last.items()})
    assert json.loads((narrow / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_critic_is_exported_with_its_head(fsdp: Path, task: Any, tmp_path: Path) -> None:
    printed = export(fsdp, "--role", "critic", "--out", tmp_path / "critic")
    assert "vllm" not in printed
    engine = build(TrainEngineSpec(ModelSettings(path=str(task.model)), FSDPSettings(device="cpu"), head="value"))
    engine.load(fsdp / "checkpoints" / "step-000002" / "critic")
    expected = {name: tensor.clone() for bucket in engine.export_weights() for name, tensor in bucket.tensors}
    engine.close()
    assert_same(weights(tmp_path / "critic"), expected)


def test_adapters_merged_or_alone_from_a_url(lora: Path, tmp_path: Path) -> None:
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    export(lora, "--out", merged)
    assert_same(weights(merged), weights(lora / "model"))
    assert_same(weights(merged / "adapter"), weights(lora / "model" / "adapter"))
    url = f"local://{lora}-remote/step-000002"
    assert "--run-config" in export(url, "--out", adapter, code=1)
    printed = export(url, "--run-config", lora / "config.yaml", "--adapter", "--out", adapter)
    assert_same(weights(adapter), weights(lora / "model" / "adapter"))
    assert "--enable-lora --max-lora-rank 8 --lora-modules adapter=" in printed
    assert (adapter / "tokenizer.json").is_file()
    from peft import PeftModel

    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).peft_config


def test_another_base_model_under_adapters_is_noticed(lora: Path, fsdp: Path, tmp_path: Path) -> None:
    printed = export(lora, "--model", fsdp / "model", "--out", tmp_path / "out", code=1)
    assert "holds adapters of another base model than model.path" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: next(iter(layout)))
def test_ranks_of_megatron_become_one_model(task: Any, tmp_path: Path, layout: dict[str, Any]) -> None:
    changes = {**SFT, "actor.engine": "megatron", "actor.megatron": {"device": "cpu", **layout}}
    folder = run_on_two_ranks(task, "sft", tmp_path / "run", changes)
    export(folder, "--out", tmp_path / "out", "--max-shard-size", "2GB")
    assert_same(weights(tmp_path / "out"), weights(folder / "model"))
    if "lora" in layout:
        export(folder, "--adapter", "--out", tmp_path / "adapter")
        assert_same(weights(tmp_path / "adapter"), weights(folder / "model" / "adapter"))
    else:
        printed = export(folder, "--adapter", "--out", tmp_path / "adapter", code=1)
        assert "trained all weights, not adapters" in printed


def test_an_engine_without_its_own_export_is_built_and_loaded(
    fsdp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = find_checkpoint(str(fsdp))
    plugin = replace(plugins.get("rlcore.train_engines", "fsdp"), export="")
    monkeypatch.setattr(plugins, "get", lambda group, name: plugin)
    model_folder.export_checkpoint(trained, tmp_path / "out", ExportOptions())
    assert_same(weights(tmp_path / "out"), weights(fsdp / "model"))
    with pytest.raises(EngineError, match="cannot export adapters alone"):
        model_folder.export_checkpoint(trained, tmp_path / "adapter", ExportOptions(adapter=True))


def mistakes(fsdp: Path, folder: Path) -> dict[str, tuple[Sequence[Any], str]]:
    """Arguments after --out, and what the message says."""
    newest = fsdp / "checkpoints" / "step-000002"
    return {
        "a model": ([fsdp / "model"], "model is a model folder; expected a run (config.yaml)"),
        "part of a checkpoint": ([newest / "actor"], f"did you mean {newest}?"),
        "a parent of runs": ([fsdp.parent], f"did you mean {fsdp}?"),
        "a typing error": ([f"{fsdp}x"], f"did you mean {fsdp}?"),
        "an unfinished checkpoint": ([f"{newest}.tmp"], f"the newest finished one is {newest}"),
        "a step that is not there": ([fsdp, "--step", 7], "no checkpoint of step 7; the nearest is step-000002"),
        "a role that is not there": ([fsdp, "--role", "ref"], "holds no 'ref'; it holds actor, critic"),
        "weights, not adapters": ([fsdp, "--adapter"], "trained all weights, not adapters"),
        "a base model that is gone": ([fsdp, "--model", folder / "gone"], "there is no such folder"),
    }


@pytest.mark.parametrize("case", mistakes(Path(), Path()))
def test_a_mistake_is_named_and_leaves_nothing(fsdp: Path, tmp_path: Path, case: str) -> None:
    arguments, says = mistakes(fsdp, tmp_path)[case]
    printed = export("--out", tmp_path / "out", *arguments, code=1)
    assert says in printed
    assert len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_existing_folders_are_refused_or_replaced(fsdp: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").touch()
    assert "exists already" in export(fsdp, "--out", taken, code=1)
    assert "is no model folder" in export(fsdp, "--out", taken, "--overwrite", code=1)
    (taken / "config.json").touch()
    export(fsdp, "--out", taken, "--overwrite")
    assert not (taken / "notes.txt").exists()


def test_a_damaged_checkpoint_is_noticed(fsdp: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(fsdp, run)
    file = run / "checkpoints" / "step-000002" / "actor" / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "rank-00001.safetensors have changed" in export(run, "--out", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(fsdp: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # of every file, for the lack of a small disk
    try:
        printed = export(fsdp, "--out", tmp_path / "out", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"model folder {tmp_path / 'out'} could not be written" in printed
    assert not list(tmp_path.iterdir())


def test_a_push_without_network_keeps_the_folder(fsdp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert "organisation/model" in export(fsdp, "--out", out, "--push-to-hub", "name", code=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    printed = export(fsdp, "--out", out, "--push-to-hub", "us/model", code=1)
    assert f"the model is in {out}, but it was not pushed to us/model: HF_HUB_OFFLINE is set" in printed
    assert_same(weights(out), weights(fsdp / "model"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in export(fsdp, "--out", out, "--overwrite", "--push-to-hub", "us/model", code=1)
