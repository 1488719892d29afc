"""Sequences that are too long for the model are refused when the engine is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlcore.engines import ModelSettings, RolloutSpec
from rlcore.errors import EngineError
from rlcore_inline.engine import build
from rlcore_inline.settings import InlineSettings
from rlcore_kit.testing.tiny_model import tiny_model

BOUNDARY = 24


def make(path: Path, max_model_len: int) -> Any:
    return build(RolloutSpec(ModelSettings(path=str(path)), InlineSettings(device="cpu"), max_model_len))


def test_rollouts_that_could_cross_the_boundary_of_rotary_scaling_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    path = tiny_model(tmp_path, architecture="Llama", max_position_embeddings=BOUNDARY, rope_parameters=rope)
    make(path, BOUNDARY).close()
    with pytest.raises(EngineError, match="the longest sequence of a rollout has 25 tokens, but beyond 24"):
        make(path, BOUNDARY + 1)


def test_rollouts_with_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, max_position_embeddings=16)
    with pytest.raises(EngineError, match=r"may have 17 tokens, but the model .* has positions for 16"):
        make(path, 17)
