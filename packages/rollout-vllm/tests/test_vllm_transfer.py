"""Weights by vLLM's weight-transfer API, with a stand-in for vLLM's transfer engines, which need GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlcore.engines import GenerationRequest, ModelSettings, RolloutSpec, SamplingParams, WeightBucket
from rlcore.errors import EngineError
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_vllm import arguments
from rlcore_vllm.engine import VLLMRollout
from rlcore_vllm.settings import VLLMSettings
from rlcore_vllm.vllm_transfer import VLLMTransfer

BY_HAND = "by_hand"
WIRE: dict[str, torch.Tensor] = {}


@dataclass
class Nothing(WeightTransferInitInfo):
    pass


@dataclass
class Names(WeightTransferUpdateInfo):
    names: list[str]


@dataclass
class ByHandTrainer(TrainerInitInfo):
    backend: ClassVar[str] = BY_HAND


class Receiving(WeightTransferEngine[Nothing, Names]):
    """Takes tensors from `WIRE` in the same process, as vLLM's engines take them from GPUs."""

    init_info_cls, update_info_cls = Nothing, Names

    def init_transfer_engine(self, init_info: Nothing) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Names) -> None:
        for name in update_info.names:
            self.model.load_weights([(name, WIRE[name])])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


class Sending(TrainerWeightTransferEngine[ByHandTrainer]):
    init_info_cls = ByHandTrainer

    @classmethod
    def trainer_init(cls, init_info: ByHandTrainer, *, client: Any, source: Any = None) -> Sending:
        client.init_weight_transfer_engine({})
        return cls(client=client, source=source)

    def send_weights(self) -> None:
        self.client.start_weight_update()
        WIRE.update(self.source)
        assert [meta.name for meta in self.source.metadata()] == list(WIRE)
        self.client.update_weights({"names": list(WIRE)})
        self.client.finish_weight_update()
        WIRE.clear()


class ByHand(VLLMTransfer):
    def _information(self) -> Any:
        return ByHandTrainer(rank=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), architecture="Llama", head_dim=32)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[VLLMRollout]:
    WeightTransferEngineFactory.register_engine(BY_HAND, Receiving)
    WeightTransferTrainerFactory.register_engine(BY_HAND, Sending)
    made = arguments.engine_arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            arguments,
            "engine_arguments",
            lambda *args, **options: {**made(*args, **options), "weight_transfer_config": {"backend": BY_HAND}},
        )
        settings = VLLMSettings(kv_cache_memory_bytes=32 << 20)
        started = VLLMRollout(RolloutSpec(ModelSettings(path=str(model)), settings, 64))
    started._delivery = ByHand(started._backend, "nccl", 60)  # type: ignore[assignment]
    yield started
    started.close()


def one_by_one(weights: dict[str, torch.Tensor]) -> Iterator[WeightBucket]:
    """Buckets of one tensor each, which divide fused layers, in memory that is overwritten afterwards."""
    for name, tensor in weights.items():
        sent = tensor.clone()
        yield WeightBucket(((name, sent),))
        sent.fill_(float("nan"))


def test_updates_through_vllms_own_api(engine: VLLMRollout, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    request = GenerationRequest([10, 60, 110], SamplingParams(max_tokens=12, seed=0, ignore_eos=True))
    with pytest.raises(EngineError, match=r"weight_transfer=nccl transfers weights between GPUs"):
        engine.update_weights(one_by_one(dict(trainer.named_parameters())), 1)
    monkeypatch.setattr(
        ByHand, "_connect", lambda self, device, source: VLLMTransfer._connect(self, torch.device("cuda"), source)
    )  # the test's engine does on the CPU what others do between GPUs
    for version in (2, 3):
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            weights = {name: parameter.detach() for name, parameter in trainer.named_parameters()}
        half = {name: tensor for name, tensor in weights.items() if "k_proj" not in name}
        with pytest.raises(EngineError, match="lacks weights of 2 layers"):
            engine.update_weights(one_by_one(half), 10 * version)
        engine.update_weights(one_by_one(weights), version)
        (made,) = engine.generate_batch([request])
        assert made.versions == [(version, 12)]
        with torch.no_grad():
            logits = trainer(input_ids=torch.tensor([[*request.prompt, *made.tokens]])).logits[0, 2:-1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(made.tokens)[:, None])[:, 0]
        assert float((expected - torch.tensor(made.logprobs)).abs().max()) < 1e-4


def test_vllms_engines_are_refused_on_the_cpu(model: Path) -> None:
    settings = VLLMSettings(mode="process", weight_transfer="nccl")
    with pytest.raises(
        EngineError, match="weight_transfer=nccl transfers weights between GPUs; set it to rlcore on the CPU"
    ):
        VLLMRollout(RolloutSpec(ModelSettings(path=str(model)), settings, 64))
