"""Sharded checkpoints: their files, other numbers of ranks, and writing in the background."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from rlcore.engines import ModelSettings, OptimSettings, TrainEngineSpec
from rlcore.errors import CheckpointError
from rlcore_fsdp.engine import FSDPTrainEngine, build
from rlcore_fsdp.settings import FSDPSettings
from rlcore_kit.checkpoint import tensor_file
from rlcore_kit.checkpoint.tensor_file import write_tensors
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine import WeightedLogprobs, exported, make_batch

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_engine(path: Path, **options: Any) -> FSDPTrainEngine:
    settings = FSDPSettings(device="cpu", **options)
    return build(TrainEngineSpec(ModelSettings(path=str(path)), settings, optim=OptimSettings(lr=1e-2), max_tokens=64))


def whole_state(engine: FSDPTrainEngine) -> dict[str, torch.Tensor]:
    """Return weights and Adam states, gathered from all ranks by `DTensor.full_tensor`."""
    found = {}
    assert engine._optimizer is not None
    for name, parameter in engine.model.named_parameters():
        tensors = {"weight": parameter.detach(), **engine._optimizer.state[parameter]}
        assert tensors.keys() == {"weight", "step", *MOMENTS}
        for kind, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[f"{kind}/{name}"] = full.clone()
    return found


def train_and_save(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    engine = make_engine(model)
    for step in range(2):
        engine.train(make_batch(seed=10 * step + engine.dp_rank), WeightedLogprobs())
    engine.start_save(folder)
    saved = whole_state(engine)
    engine.train(make_batch(seed=engine.dp_rank), WeightedLogprobs())
    engine.finish_save()
    after = whole_state(engine)
    assert not any(torch.equal(after[name], tensor) for name, tensor in saved.items() if tensor.ndim == 2)
    return saved


def load_and_save(model: Path, source: Path, target: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the states of an engine on these ranks after loading, and whether it is sharded."""
    engine = make_engine(model)
    engine.load(source)
    state = whole_state(engine)
    engine.start_save(target)
    engine.finish_save()
    return state, all(isinstance(parameter, DTensor) for parameter in engine.model.parameters())


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 261 rows of embeddings and 63 of the MLP divide neither by two nor by four
    return tiny_model(tmp_path_factory.mktemp("model"), intermediate_size=63)


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def test_one_and_four_ranks_load_a_checkpoint_of_two(two: RankPool, model_path: Path, tmp_path: Path) -> None:
    """Weights and Adam states are the same bits after every change of the number of ranks."""
    expected = two.run(train_and_save, model_path, tmp_path / "two")[0]
    alone, sharded = load_and_save(model_path, tmp_path / "two", tmp_path / "one")
    assert not sharded
    four = RankPool(4)
    try:
        results = four.run(load_and_save, model_path, tmp_path / "one", tmp_path / "four", timeout=240)
    finally:
        four.close()
    again, _ = load_and_save(model_path, tmp_path / "four", tmp_path / "last")
    assert all(sharded for _, sharded in results)
    assert len(list((tmp_path / "four").glob("rank-*.safetensors"))) == 4
    for found in (alone, again, *(state for state, _ in results)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def start_twice(model: Path, folder: Path) -> str:
    engine = make_engine(model)
    engine.start_save(folder / "first")
    try:
        engine.start_save(folder / "second")
    except CheckpointError as error:
        engine.finish_save()
        return str(error)
    return ""


def test_a_second_save_is_refused_while_one_is_unfinished(two: RankPool, model_path: Path, tmp_path: Path) -> None:
    for message in two.run(start_twice, model_path, tmp_path):
        assert f"the save to {tmp_path / 'first'} is unfinished" in message
    assert not (tmp_path / "second").exists()


def fail_on_rank_one(model: Path, folder: Path, background: bool) -> tuple[str, bool]:
    """Return the error, and whether the engine can save again and continue."""
    engine = make_engine(model)
    if engine.dp_rank == 1:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rank-00001.safetensors").mkdir()
    try:
        if background:
            engine.start_save(folder)
            engine.train(make_batch(seed=engine.dp_rank), WeightedLogprobs())
            engine.finish_save()
        else:
            engine.save(folder)
    except CheckpointError as error:
        engine.start_save(folder.parent / "again")
        expected = exported(engine)
        engine.finish_save()
        other = make_engine(model)
        other.load(folder.parent / "again")
        return str(error), all(torch.equal(tensor, expected[name]) for name, tensor in exported(other).items())
    return "", False


@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_cannot_write_fails_all(two: RankPool, model_path: Path, tmp_path: Path, background: bool) -> None:
    folder = tmp_path / "checkpoint"
    for message, works in two.run(fail_on_rank_one, model_path, folder, background):
        assert f"rank 1: cannot write {folder / 'rank-00001.safetensors'}" in message
        assert works
    assert not (folder / "checkpoint.json").exists()


def test_a_full_disk_is_reported_by_a_background_save(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as the system reports it: without the file's name

    engine = make_engine(model_path)
    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.os, "fsync", full)
        engine.start_save(tmp_path)
        with pytest.raises(CheckpointError, match=r"rank 0: cannot write .*rank-00000\.safetensors: No space left"):
            engine.finish_save()
    assert not (tmp_path / "checkpoint.json").exists()


def test_training_does_not_wait_for_the_disk(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not respond until a step has ended neither delays the step nor changes its result."""
    engine, control = make_engine(model_path), make_engine(model_path)
    answers, fsync = threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert answers.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(tensor_file.os, "fsync", slow)
    engine.start_save(tmp_path)
    metrics = engine.train(make_batch(), WeightedLogprobs()).to_dict()
    assert not engine.save_done()
    answers.set()
    engine.finish_save()
    assert engine.save_done()
    assert metrics == control.train(make_batch(), WeightedLogprobs()).to_dict()
    engine.load(tmp_path)
    assert engine.train(make_batch(), WeightedLogprobs()).to_dict() == metrics


def test_a_checkpoint_of_another_format_or_engine_is_refused(model_path: Path, tmp_path: Path) -> None:
    engine = make_engine(model_path)
    engine.save(tmp_path)
    manifest = tmp_path / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"format":2', '"format":1'))
    with pytest.raises(CheckpointError, match="has format 1, this rlcore reads 2"):
        engine.load(tmp_path)
    content = json.loads(manifest.read_text())
    del content["head"], content["adam_steps"]
    manifest.write_text(json.dumps(content | {"engine": "megatron", "adam_step": 1.0}))
    with pytest.raises(CheckpointError, match="was written by the engine megatron, not 'fsdp'"):
        engine.load(tmp_path)


DTYPES = [dtype for dtype in tensor_file._NAMES if dtype.itemsize > 1] + [torch.uint8, torch.int8, torch.bool]


def test_safetensors_reads_the_files(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(13).to(dtype) for dtype in DTYPES}
    tensors |= {
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "turned": torch.arange(12.0).reshape(3, 4).T,
        "large": torch.arange(3_000_000),
    }
    float8 = {str(t): torch.arange(8.0).to(t) for t in (torch.float8_e4m3fn, torch.float8_e5m2)}
    record = write_tensors(tmp_path / "file", tensors | float8, {"words": '{"ä": 1}'})
    content = (tmp_path / "file").read_bytes()
    assert record == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys() | float8.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
    assert all(torch.equal(read[name].float(), tensor.float()) for name, tensor in float8.items())
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"words": '{"ä": 1}'}
