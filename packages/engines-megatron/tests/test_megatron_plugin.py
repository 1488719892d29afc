"""The plugin and its settings: found without torch or megatron; wrong settings are reported before anything starts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rlcore import plugins
from rlcore.config import Config
from rlcore.engines import ModelSettings, TrainEngineSpec
from rlcore.errors import EngineError
from rlcore_megatron.engine import build
from rlcore_megatron.layout import check_layout
from rlcore_megatron.settings import MegatronSettings

FIELDS = {"num_attention_heads": 12, "num_query_groups": 4, "num_layers": 12, "ffn_hidden_size": 48}


def test_the_plugin_is_found_by_its_name():
    assert plugins.get("rlcore.train_engines", "megatron").config_class() is MegatronSettings


def test_settings_import_neither_torch_nor_megatron():
    code = (
        "import sys; from rlcore_megatron.settings import MegatronSettings\n"
        "MegatronSettings(transformer={'attention_backend': 'auto'}, ddp={'overlap_grad_reduce': True})\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_parallel": True}, "tensor_parallel is 1"),
        ({"virtual_pipeline": 2}, "pipeline_parallel is 1"),
        ({"expert_parallel": 2, "tensor_parallel": 2}, "must be true where expert_parallel and tensor_parallel"),
        ({"transformer": {"moe_router_topkk": 2}}, "no such field; did you mean moe_router_topk"),
        ({"transformer": {"tensor_model_parallel_size": 2}}, "is determined by tensor_parallel"),
        ({"optimizer": {"clip_grad": 1.0}}, "is determined by optim.clip_grad"),
        ({"optimizer": {"sgd_momentun": 1.0}}, "did you mean sgd_momentum"),
        ({"ddp": {"overlap_grad_reduc": True}}, "did you mean overlap_grad_reduce"),
        ({"ddp": {"use_distributed_optimizer": True}}, "is determined by distributed_optimizer"),
    ],
)
def test_wrong_settings_are_reported(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        MegatronSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "world", "reason"),
    [
        ({"tensor_parallel": 5}, 5, "12 attention heads are not divisible by tensor_parallel 5"),
        ({"tensor_parallel": 6}, 6, "4 key-value heads are neither a multiple nor a divisor of tensor_parallel 6"),
        ({"pipeline_parallel": 8}, 8, "12 layers are not divisible by pipeline_parallel 8"),
        ({"pipeline_parallel": 4, "virtual_pipeline": 2}, 4, "pipeline_parallel 4 x virtual_pipeline 2"),
        ({"tensor_parallel": 2, "context_parallel": 2}, 6, "= 4 does not divide the number of processes 6"),
        ({"expert_parallel": 2}, 2, "expert_parallel is 2, but the model has no experts"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_explained(settings: dict[str, Any], world: int, reason: str):
    with pytest.raises(EngineError, match="cannot be divided over") as caught:
        check_layout(MegatronSettings(**settings), FIELDS, world, "a model")
    assert reason in str(caught.value)


def test_experts_must_be_divisible_too():
    fields = {**FIELDS, "num_moe_experts": 6, "moe_ffn_hidden_size": 10}
    settings = MegatronSettings(expert_parallel=4, tensor_parallel=4, sequence_parallel=True)
    with pytest.raises(EngineError) as caught:
        check_layout(settings, fields, 16, "a model")
    assert "6 experts are not divisible by expert_parallel 4" in str(caught.value)
    assert "an expert's intermediate size of 10 is not divisible by expert_tensor_parallel 4" in str(caught.value)
    with pytest.raises(EngineError, match="needs sequence_parallel: true"):
        check_layout(MegatronSettings(tensor_parallel=2), {**fields, "num_moe_experts": 4}, 2, "a model")


def test_options_of_another_engine_are_refused():
    with pytest.raises(EngineError, match="options of the megatron engine are MegatronSettings, not Config"):
        build(TrainEngineSpec(ModelSettings(path="x"), Config()))
