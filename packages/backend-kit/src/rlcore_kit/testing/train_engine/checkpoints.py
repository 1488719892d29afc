"""Checkpoints: bit-exact continuation, background writing, damage."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from rlcore.engines import OptimSettings
from rlcore.errors import CheckpointError
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine.base import TrainEngineTests
from rlcore_kit.testing.train_engine.batches import exported, make_batch
from rlcore_kit.testing.train_engine.objectives import WeightedLogprobs


class CheckpointTests(TrainEngineTests):
    """`TrainEngine.save`, `start_save`, `finish_save` and `load`."""

    def test_training_continues_bit_for_bit(self, model_path: Path, tmp_path: Path) -> None:
        optim = OptimSettings(lr=1e-2, warmup_steps=3, schedule="cosine", total_steps=9)
        engine = self.engine(model_path, optim=optim)
        for step in range(2):
            engine.train(make_batch(seed=step), WeightedLogprobs())
        engine.save(tmp_path / "checkpoint")
        drawn = torch.rand(3)
        straight = [engine.train(make_batch(seed=step), WeightedLogprobs()).to_dict() for step in (2, 3)]
        other = self.engine(model_path, optim=optim)
        other.train(make_batch(seed=9), WeightedLogprobs())
        other.load(tmp_path / "checkpoint")
        assert torch.equal(torch.rand(3), drawn)
        resumed = [other.train(make_batch(seed=step), WeightedLogprobs()).to_dict() for step in (2, 3)]
        assert resumed == straight
        first, second = exported(engine), exported(other)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_training_goes_on_while_a_checkpoint_is_written(self, model_path: Path, tmp_path: Path) -> None:
        """`start_save` writes what `save` would have written when it was called."""
        engine = self.engine(model_path)
        assert engine.save_done()
        assert engine.finish_save() == {}
        for step in range(2):  # the second time with the buffers of the first
            engine.train(make_batch(seed=step), WeightedLogprobs())
            now, later = tmp_path / f"now{step}", tmp_path / f"later{step}"
            engine.save(now)
            engine.finish_save()
            engine.start_save(later)
            drawn = torch.rand(3)
            straight = engine.train(make_batch(seed=9), WeightedLogprobs()).to_dict()
            records = engine.finish_save()
            assert engine.save_done()
            assert engine.finish_save() == {}
            files = {path.relative_to(now).as_posix(): path.read_bytes() for path in now.rglob("*") if path.is_file()}
            assert files.keys() == {path.relative_to(later).as_posix() for path in later.rglob("*") if path.is_file()}
            for name, content in files.items():
                assert (later / name).read_bytes() == content, name
                if records:
                    assert records[name] == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            other = self.engine(model_path)
            other.load(later)
            assert torch.equal(torch.rand(3), drawn)
            assert other.train(make_batch(seed=9), WeightedLogprobs()).to_dict() == straight

    def test_a_checkpoint_that_cannot_be_written_is_named(self, model_path: Path, tmp_path: Path) -> None:
        engine = self.engine(model_path)
        (tmp_path / "file").write_text("mine")

        def begin_and_finish(path: Path) -> None:
            engine.start_save(path)
            engine.finish_save()

        for save in (engine.save, begin_and_finish):
            with pytest.raises(CheckpointError, match=str(tmp_path / "file")):
                save(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"
        engine.start_save(tmp_path / "good")
        engine.finish_save()
        engine.load(tmp_path / "good")

    def test_a_checkpoint_before_the_first_step_forgets_later_ones(self, model_path: Path, tmp_path: Path) -> None:
        engine = self.engine(model_path)
        engine.save(tmp_path / "checkpoint")
        first = engine.train(make_batch(), WeightedLogprobs()).to_dict()
        weights = exported(engine)
        engine.load(tmp_path / "checkpoint")
        assert engine.train(make_batch(), WeightedLogprobs()).to_dict() == first
        assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(engine).items())

    def test_a_frozen_engine_takes_trained_weights(self, model_path: Path, tmp_path: Path) -> None:
        engine, frozen = self.engine(model_path), self.engine(model_path, optim=None)
        engine.train(make_batch(), WeightedLogprobs())
        engine.save(tmp_path / "checkpoint")
        frozen.load(tmp_path / "checkpoint")
        weights = exported(engine)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(frozen).items())

    def test_a_damaged_checkpoint_changes_nothing(self, model_path: Path, tmp_path: Path) -> None:
        engine = self.engine(model_path)
        engine.train(make_batch(), WeightedLogprobs())
        good = tmp_path / "good"
        engine.save(good)
        files = [path.relative_to(good) for path in good.rglob("*") if path.is_file()]
        control = self.engine(model_path)
        control.load(good)
        engine.train(make_batch(seed=1), WeightedLogprobs())
        control.train(make_batch(seed=1), WeightedLogprobs())
        damages = [(file, how) for file in files for how in ("removed", "truncated")]
        for number, (file, how) in enumerate(damages):
            bad = tmp_path / f"bad{number}"
            shutil.copytree(good, bad)
            if how == "removed":
                (bad / file).unlink()
            else:
                content = (bad / file).read_bytes()
                (bad / file).write_bytes(content[: len(content) // 2])
            with pytest.raises(CheckpointError):
                engine.load(bad)
        with pytest.raises(CheckpointError):
            engine.load(tmp_path / "nowhere")
        before, after = exported(control), exported(engine)
        assert all(torch.equal(before[name], after[name]) for name in before)
        a, b = (e.train(make_batch(seed=2), WeightedLogprobs()).to_dict() for e in (engine, control))
        assert a == b

    def test_a_flipped_bit_in_a_checkpoint_is_found(self, model_path: Path, tmp_path: Path) -> None:
        engine = self.engine(model_path)
        engine.save(tmp_path / "checkpoint")
        largest = max((p for p in (tmp_path / "checkpoint").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) * 3 // 4] ^= 1
        largest.write_bytes(bytes(content))
        with pytest.raises(CheckpointError):
            engine.load(tmp_path / "checkpoint")

    def test_a_checkpoint_of_another_model_is_refused(self, model_path: Path, tmp_path: Path) -> None:
        wider = tiny_model(tmp_path / "wider", architecture=self.architecture, intermediate_size=96)
        self.engine(wider).save(tmp_path / "checkpoint")
        engine = self.engine(model_path)
        before = exported(engine)
        with pytest.raises(CheckpointError, match=r"another (base )?model"):
            engine.load(tmp_path / "checkpoint")
        assert all(torch.equal(tensor, before[name]) for name, tensor in exported(engine).items())
