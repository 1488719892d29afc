"""A tiny policy behind the inline rollout engine, which all files of the session share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlcore import plugins
from rlcore.engines import ModelSettings, RolloutEngine, RolloutSpec
from rlcore_kit.testing.tiny_model import tiny_model

MAX_MODEL_LEN = 4096


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a random model whose tokens are bytes; answers end at ``<|end|>`` (1)."""
    return tiny_model(tmp_path_factory.mktemp("policy") / "model", max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def engine(policy: Path) -> Iterator[RolloutEngine]:
    """The policy on the inline engine, with `MAX_MODEL_LEN`."""
    inline = plugins.get("rlcore.rollout_engines", "inline")
    spec = RolloutSpec(ModelSettings(path=str(policy)), inline.config_class()(), MAX_MODEL_LEN, seed=1)
    engine: RolloutEngine = inline.build(spec)
    yield engine
    engine.close()
