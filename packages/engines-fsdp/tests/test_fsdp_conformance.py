"""The engine passes the conformance kit: plain and sharded, in several architectures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlcore.engines import TrainEngine, TrainEngineSpec
from rlcore_fsdp import sharding
from rlcore_fsdp.engine import build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.testing.train_engine import TrainEngineConformance


class TestPlain(TrainEngineConformance):
    """One process, fp32: the plain module."""

    def make_engine(self, spec: TrainEngineSpec) -> TrainEngine:
        return build(replace(spec, options=FSDPSettings(device="cpu")))


class TestCheckpointedUntied(TrainEngineConformance):
    """Recomputed activations, an untied output head, logits of seven tokens at a time."""

    architecture = "Llama"

    def make_engine(self, spec: TrainEngineSpec) -> TrainEngine:
        return build(replace(spec, options=FSDPSettings(device="cpu", gradient_checkpointing=True, logits_chunk=7)))


class TestShardedOverOne(TrainEngineConformance):
    """FSDP2 with a process group of one, which uses the code for several processes."""

    architecture = "Qwen3"

    @pytest.fixture(autouse=True)
    def force_sharding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rlcore_fsdp.model_building.needs_sharding", lambda *_: True)

    def make_engine(self, spec: TrainEngineSpec) -> TrainEngine:
        engine = build(replace(spec, options=FSDPSettings(device="cpu")))
        assert isinstance(engine.root, torch.distributed.fsdp.FSDPModule)
        assert sharding.decoder_layers(engine.model)
        return engine
