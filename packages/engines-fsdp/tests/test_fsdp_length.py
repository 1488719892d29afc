"""Sequences that are too long for the model: rotary scaling that depends on length, and the number of positions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest, ModelSettings, TrainEngineSpec
from rlcore.errors import EngineError, RlcoreWarning
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.model_folder.length import longest_position, rope_boundary
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import reference_outputs

BOUNDARY = 24


def longrope() -> dict[str, Any]:
    """Return a new dictionary each time, because transformers writes to it."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": BOUNDARY,
        "short_factor": [1.0] * 4,
        "long_factor": [9.0] * 4,
    }


MODELS: dict[str, dict[str, Any]] = {
    "longrope": {
        "architecture": "Phi3",
        "max_position_embeddings": 4 * BOUNDARY,
        "original_max_position_embeddings": BOUNDARY,
        "rope_parameters": longrope(),
    },
    "llama-longrope": {"architecture": "Llama", "max_position_embeddings": 4 * BOUNDARY, "rope_parameters": longrope()},
    "dynamic": {
        "architecture": "Llama",
        "max_position_embeddings": BOUNDARY,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / name, initializer_range=0.3, **options) for name, options in MODELS.items()}


def make_engine(path: Path, max_length: int | None = None) -> FSDPTrainEngine:
    settings = ModelSettings(path=str(path))
    return build(TrainEngineSpec(settings, FSDPSettings(device="cpu"), max_tokens=1000, max_length=max_length))


def batch_of(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch({"tokens": Jagged.from_list([torch.randint(5, 250, (n,), generator=generator) for n in lengths])})


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_within_the_boundary_of_rotary_scaling_are_those_of_transformers(
    models: dict[str, Path], name: str
) -> None:
    """Short factors are used for every packed length; a sequence beyond the boundary is refused."""
    engine, batch = make_engine(models[name], BOUNDARY), batch_of(5, BOUNDARY, 17, BOUNDARY, 9)
    assert batch.total_tokens > 3 * BOUNDARY
    model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32, attn_implementation="eager")
    for row, got in zip(batch.rows(), engine.forward(batch, ForwardRequest()).rows()):
        expected, _ = reference_outputs(model, row["tokens"])
        torch.testing.assert_close(got["logprobs"], expected.detach(), atol=2e-5, rtol=0)
    with pytest.raises(EngineError, match=rf"a sequence has 25 tokens, but beyond {BOUNDARY} the rotary scaling"):
        engine.forward(batch_of(3, BOUNDARY + 1), ForwardRequest())


@pytest.mark.parametrize("name", MODELS)
def test_runs_that_could_cross_the_boundary_are_refused(models: dict[str, Path], name: str) -> None:
    with pytest.raises(EngineError, match="the longest sequence of the run has 25 tokens, but beyond 24"):
        make_engine(models[name], BOUNDARY + 1)


@pytest.mark.parametrize("name", MODELS)
def test_rotary_scaling_that_no_configuration_field_shows_is_detected(
    models: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check at loading covers the last positions, also for architectures that the tests cover."""
    monkeypatch.setattr("rlcore_fsdp.verification.rope_boundary", lambda config: None)
    monkeypatch.setattr("rlcore_fsdp.verification.longest_position", lambda config: None)
    with pytest.raises(EngineError, match="packed outputs differ from those of the sequences alone"):
        make_engine(models[name])


def config_of(**fields: Any) -> Any:
    config = SimpleNamespace(**fields)
    config.get_text_config = lambda: config
    return config


def test_the_lengths_of_configurations_are_read() -> None:
    plain = config_of(max_position_embeddings=512, rope_parameters={"rope_type": "default"})
    assert (rope_boundary(plain), longest_position(plain)) == (None, 512)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert longest_position(config_of(max_position_embeddings=512, rope_parameters=yarn)) == 2048
    assert longest_position(config_of(max_position_embeddings=2048, rope_parameters=yarn)) == 2048
    layers = {"full_attention": longrope(), "sliding_attention": {"rope_type": "default"}}
    assert rope_boundary(config_of(max_position_embeddings=99, rope_parameters=layers)) == ("longrope", BOUNDARY)
    older = config_of(max_position_embeddings=99, rope_scaling={**longrope(), "rope_type": "su"})
    assert rope_boundary(older) == ("longrope", BOUNDARY)
    old = config_of(max_position_embeddings=99, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert rope_boundary(old) == ("dynamic", 99)
    assert longest_position(config_of(rope_parameters=None)) is None


def test_sequences_with_more_tokens_than_positions_are_warned_about(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, max_position_embeddings=16)
    engine = make_engine(path, 17)
    engine.forward(batch_of(16), ForwardRequest())
    with pytest.warns(RlcoreWarning, match="longer than the 16 positions"):
        engine.forward(batch_of(17), ForwardRequest())
