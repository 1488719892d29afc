"""The inline rollout and the FSDP engine in one process: weights lent and streamed, and the page's examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlcore.engines import (
    GenerationRequest,
    ModelSettings,
    RolloutSpec,
    SamplingParams,
    TrainEngineSpec,
    WeightBucket,
    WeightLender,
    sync_weights,
)
from rlcore.errors import EngineError
from rlcore_fsdp import engine as fsdp
from rlcore_fsdp.settings import FSDPSettings
from rlcore_inline.engine import InlineRollout, build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.tiny_model import tiny_model


def trainer(path: Path, **changes: Any) -> fsdp.FSDPTrainEngine:
    return fsdp.build(TrainEngineSpec(ModelSettings(path=str(path)), FSDPSettings(device="cpu"), **changes))


def separate_rollout(path: Path) -> InlineRollout:
    return build(RolloutSpec(ModelSettings(path=str(path)), InlineSettings(device="cpu"), 512))


def all_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors under every name, those of tied weights too."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def test_only_a_policy_lends_its_weights(tmp_path: Path) -> None:
    path = tiny_model(tmp_path)
    critic = trainer(path, head="value")
    assert isinstance(critic, WeightLender)
    rollout = build(RolloutSpec(ModelSettings(path=str(path)), InlineSettings(), 512, train_engine=critic))
    with pytest.raises(EngineError, match="a model with a value head cannot generate"):
        rollout.wake()


def test_a_rollout_takes_the_trainers_stream(tmp_path: Path) -> None:
    rollout_model, trained_model = (
        tiny_model(tmp_path / str(seed), seed=seed, initializer_range=0.15) for seed in range(2)
    )
    rollout = separate_rollout(rollout_model)
    sync_weights(trainer(trained_model), rollout, 5, bucket_bytes=4096)
    (completion,) = rollout.generate_batch(
        [GenerationRequest((5, 6, 7), SamplingParams(max_tokens=20, seed=0, ignore_eos=True))]
    )
    assert completion.versions == [(5, 20)]
    model: Any = AutoModelForCausalLM.from_pretrained(trained_model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, *completion.tokens]])).logits[0, 2:-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
    assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("architecture", ["Qwen3Moe", "Mixtral"])
def test_experts_travel_as_files_hold_them(tmp_path: Path, architecture: str) -> None:
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sent, received = (
        tiny_model(tmp_path / str(seed), architecture=architecture, seed=seed, head_dim=8, **sizes) for seed in range(2)
    )
    actor = trainer(sent, max_tokens=512)
    tensors = {name: tensor for part in actor.export_weights(4096) for name, tensor in part.tensors}
    in_file = load_file(sent / "model.safetensors")
    assert tensors.keys() == in_file.keys()
    assert any(".experts.3." in name for name in tensors)
    assert all(tensor.equal(in_file[name]) for name, tensor in tensors.items())
    rollout, expected = separate_rollout(received), all_weights(sent)
    for order in (1, -1):
        rollout.update_weights(
            [WeightBucket(((name, tensors[name]),)) for name in list(tensors)[::order]], version=2 + order
        )
        found = rollout._source.model.state_dict()
        assert all(tensor.equal(found[name]) for name, tensor in expected.items())
        rollout._source.model.apply(lambda module: [p.data.zero_() for p in module.parameters()])
    tensors.pop(next(name for name in tensors if ".experts.3." in name))
    with pytest.raises(EngineError, match="lacks 1 of"):
        rollout.update_weights([WeightBucket(tuple(tensors.items()))], version=4)
    rollout.close()


def test_the_documentations_examples_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rollouts.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        exec(block, namespace)
    assert len(blocks) == 3
    assert namespace["completion"].finish_reason in ("stop", "length")
