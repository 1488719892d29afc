"""The engine passes the conformance kit in one process; `test_megatron_parallel` shows that several give the same."""

from __future__ import annotations

from dataclasses import replace

from rlcore.engines import TrainEngine, TrainEngineSpec
from rlcore_kit.testing.train_engine import TrainEngineConformance
from rlcore_megatron.engine import build
from rlcore_megatron.settings import MegatronSettings


class TestDistributedOptimizer(TrainEngineConformance):
    """The defaults: weights and optimizer states in shared buffers."""

    def make_engine(self, spec: TrainEngineSpec) -> TrainEngine:
        return build(replace(spec, options=MegatronSettings(device="cpu")))


class TestPlainOptimizerRecomputed(TrainEngineConformance):
    """Untied embeddings, recomputed layers, logits of seven tokens at a time, undivided optimizer states."""

    architecture = "Llama"

    def make_engine(self, spec: TrainEngineSpec) -> TrainEngine:
        options = MegatronSettings(device="cpu", recompute="full", logits_chunk=7, distributed_optimizer=False)
        return build(replace(spec, options=options))
