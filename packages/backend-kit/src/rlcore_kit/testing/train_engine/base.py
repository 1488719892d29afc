"""Base of the tests of training engines: the engine under test, tiny models, a reference model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.config import Config
from rlcore.engines import ModelSettings, OptimSettings, TrainEngine, TrainEngineSpec
from rlcore_kit.testing.tiny_model import tiny_model


class TrainEngineTests:
    """Base of the parts of `TrainEngineConformance`."""

    architecture: str = "Qwen2"
    logprob_atol: float = 2e-5
    weight_atol: float = 2e-6

    def make_engine(self, spec: TrainEngineSpec) -> TrainEngine:
        """Make the engine under test in one process, for ``spec`` with ``options`` of the backend."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def model_path(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Write a tiny policy and return its folder."""
        return tiny_model(tmp_path_factory.mktemp("model"), architecture=cls.architecture)

    @pytest.fixture(scope="class")
    @classmethod
    def heads(cls, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        """Return a model for each scalar head: a critic starts from the policy, a reward model has a head."""
        folder = tmp_path_factory.mktemp("reward")
        return {"value": model_path, "score": tiny_model(folder, architecture=cls.architecture, head="score")}

    def engine(self, path: Path, **overrides: Any) -> TrainEngine:
        """Make an engine over the model in ``path``; ``overrides`` are fields of `TrainEngineSpec`."""
        settings: dict[str, Any] = {"optim": OptimSettings(lr=1e-2), "max_tokens": 64, **overrides}
        return self.make_engine(TrainEngineSpec(ModelSettings(path=str(path)), Config(), **settings))

    @staticmethod
    def reference(path: Path) -> Any:
        """Load the model in transformers, in fp32."""
        transformers: Any = import_module("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        model.get_input_embeddings().padding_idx = None  # otherwise its embedding is not trained
        return model
