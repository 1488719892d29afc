"""Weights in device memory: exported, lent, offloaded."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlcore.engines import ForwardRequest, WeightBucket, WeightLender
from rlcore_kit.testing.train_engine.base import TrainEngineTests
from rlcore_kit.testing.train_engine.batches import exported, make_batch, reference_outputs
from rlcore_kit.testing.train_engine.objectives import WeightedLogprobs


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Compute attention as transformers does: that of the engine may need packed rows."""
    own = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = own


class WeightTests(TrainEngineTests):
    """`TrainEngine.export_weights`, `WeightLender`, `TrainEngine.offload`."""

    def test_export_streams_every_weight_once(self, model_path: Path) -> None:
        model = self.reference(model_path)
        expected = {name: p.detach() for name, p in model.named_parameters()}  # tied weights once
        limit = 20_000
        buckets = list(self.engine(model_path).export_weights(limit))
        names = [name for bucket in buckets for name, _ in bucket.tensors]
        assert names == list(expected)
        assert len(buckets) > 2
        assert all(bucket.nbytes <= limit or len(bucket.tensors) == 1 for bucket in buckets)
        for bucket in buckets:
            for name, tensor in bucket.tensors:
                torch.testing.assert_close(tensor.cpu().float(), expected[name], atol=0, rtol=0, msg=name)

    def test_export_holds_two_buckets_at_most(self, model_path: Path) -> None:
        seen: list[weakref.ref[WeightBucket]] = []
        for bucket in self.engine(model_path).export_weights(5_000):
            seen.append(weakref.ref(bucket))
            assert sum(reference() is not None for reference in seen) <= 2
        assert len(seen) > 3

    def test_export_gives_the_weights_that_compute(self, model_path: Path) -> None:
        engine, model, batch = self.engine(model_path), self.reference(model_path), make_batch()
        engine.train(batch, WeightedLogprobs())
        model.load_state_dict(exported(engine), strict=False)
        model.tie_weights()
        out = engine.forward(batch, ForwardRequest())
        for row, result in zip(batch.rows(), out.rows()):
            logprobs, _ = reference_outputs(model, row["tokens"])
            wanted = logprobs.detach() * row["loss_mask"]
            torch.testing.assert_close(result["logprobs"], wanted, atol=self.logprob_atol, rtol=0)

    def test_offloading_changes_no_result(self, model_path: Path) -> None:
        engine, control, batch = self.engine(model_path), self.engine(model_path), make_batch()
        for step in range(2):
            engine.offload()
            engine.offload("params")
            expected = control.train(make_batch(seed=step), WeightedLogprobs()).to_dict()
            assert engine.train(make_batch(seed=step), WeightedLogprobs()).to_dict() == expected
            engine.offload("optimizer")
            engine.onload()
            engine.onload("params", "optimizer")
        engine.offload("params")
        first, second = (e.forward(batch, ForwardRequest()).flat("logprobs") for e in (engine, control))
        assert torch.equal(first, second)

    def test_lent_weights_are_those_that_compute(self, model_path: Path) -> None:
        """Only engines that satisfy `WeightLender` lend weights; others pass."""
        engine, batch = self.engine(model_path), make_batch()
        if not isinstance(engine, WeightLender):
            return
        steps = engine.step_count
        engine.train(batch, WeightedLogprobs())
        assert engine.step_count > steps
        out = engine.forward(batch, ForwardRequest())
        with engine.generation_weights() as model, torch.no_grad(), _eager_attention(model):
            assert not model.training
            for row, result in zip(batch.rows(), out.rows()):
                logprobs, _ = reference_outputs(model, row["tokens"])
                wanted = logprobs * row["loss_mask"]
                torch.testing.assert_close(result["logprobs"], wanted, atol=self.logprob_atol, rtol=0)
        engine.train(batch, WeightedLogprobs())
