"""The inline rollout passes the conformance suite with either decoder, with much and little memory."""

from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rlcore.engines import ModelSettings, RolloutSpec
from rlcore_inline.engine import InlineRollout, build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.rollout_engine import RolloutEngineConformance


class PlainModel:
    """A minimal `WeightLender`: one unsharded model."""

    dp_rank, dp_size, device = 0, 1, torch.device("cpu")

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.step_count = 0
        self.held = 0

    @contextmanager
    def generation_weights(self):
        self.held += 1
        yield self.model
        self.held -= 1

    def load(self, path: Path) -> None:
        self.model.load_state_dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict())
        self.step_count += 1


class InlineConformance(RolloutEngineConformance):
    logprob_tolerance = 1e-5
    settings = InlineSettings()

    def make_engine(self, model: Path, max_model_len: int) -> InlineRollout:
        self.__class__.source = PlainModel(model)
        spec = RolloutSpec(ModelSettings(path=str(model)), self.settings, max_model_len, train_engine=self.source)
        return build(spec)

    def load_weights(self, engine: InlineRollout, model: Path, version: int) -> None:
        self.source.load(model)
        engine.update_weights((), version)


class TestDirect(InlineConformance):
    settings = InlineSettings(decoder="direct")


class TestGeneric(InlineConformance):
    settings = InlineSettings(decoder="generic")


class TestLittleMemory(InlineConformance):
    """Few rows, and a cache that holds only one sequence of the full length: rows are preempted and come back."""

    settings = InlineSettings(max_running=12, kv_cache_tokens=4096, prefill_tokens=64)


class TestModelCopy(RolloutEngineConformance):
    """Without a policy in the process: weights arrive in buckets."""

    logprob_tolerance = 1e-5

    def make_engine(self, model: Path, max_model_len: int) -> InlineRollout:
        settings = InlineSettings(device="cpu")
        return build(RolloutSpec(ModelSettings(path=str(model)), settings, max_model_len))


del InlineConformance, RolloutEngineConformance
