"""Steps of `TrainEngine.train` against plain AdamW."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from rlcore.engines import OptimSettings
from rlcore.errors import EngineError
from rlcore_kit.testing.train_engine.base import TrainEngineTests
from rlcore_kit.testing.train_engine.batches import exported, make_batch, make_pairs, reference_outputs
from rlcore_kit.testing.train_engine.objectives import BreaksOff, PairMargin, WeightedLogprobs


class StepTests(TrainEngineTests):
    """`TrainEngine.train` of a policy."""

    def test_a_closed_engine_is_freed_without_the_garbage_collector(self, model_path: Path) -> None:
        """A cycle of references would keep its weights, and the threads of its process groups, until a collection."""
        engine = self.engine(model_path)
        engine.train(make_batch(), WeightedLogprobs())
        left = weakref.ref(engine)
        gc.disable()
        try:
            engine.close()
            del engine
            assert left() is None
        finally:
            gc.enable()

    def test_steps_equal_plain_adamw(self, model_path: Path) -> None:
        """Three steps with clipping, weight decay, warm-up and decay."""
        optim = OptimSettings(
            lr=1e-3, weight_decay=0.1, clip_grad=0.5, schedule="linear", warmup_steps=2, total_steps=4, min_lr_ratio=0.1
        )
        engine, model = self.engine(model_path, optim=optim), self.reference(model_path)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() <= 1]
        adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-3, foreach=False
        )
        for step, lr in enumerate((5e-4, 1e-3, 1e-3)):
            batch = make_batch(seed=step)
            metrics = engine.train(batch, WeightedLogprobs(0.8)).to_dict()
            loss = torch.zeros(())
            for row in batch.rows():
                logprobs, entropy = reference_outputs(model, row["tokens"], 0.8)
                loss -= ((logprobs * row["weights"] + 0.05 * entropy) * row["loss_mask"]).sum()
            (loss / batch.flat("loss_mask").sum()).backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for group in adamw.param_groups:
                group["lr"] = lr
            adamw.step()
            adamw.zero_grad()
            assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
            assert metrics["lr"] == pytest.approx(lr)
            assert metrics["skipped_steps"] == 0
            assert metrics["samples"] == len(batch)
        # Adam divides by the gradient's size: where a gradient is rounding noise, its step is too.
        expected = dict(model.named_parameters())
        for name, tensor in exported(engine).items():
            difference = (tensor - expected[name].detach()).abs()
            assert float(difference.quantile(0.99)) < 20 * self.weight_atol, name
            assert float(difference.max()) < 1e-3, name

    def test_a_step_does_not_depend_on_micro_batches(self, model_path: Path) -> None:
        batch, weights, metrics = make_batch(), [], []
        for size in (1000, 41, 1):
            # With a huge ε, AdamW's first step is plain gradient descent: lr · gradient / ε.
            engine = self.engine(model_path, max_tokens=size, optim=OptimSettings(lr=1.0, eps=1.0, clip_grad=None))
            metrics.append(engine.train(batch, WeightedLogprobs()).to_dict())
            weights.append(exported(engine))
        for other in (1, 2):
            assert metrics[other] == pytest.approx(metrics[0], rel=1e-4)
            for name, tensor in weights[0].items():
                torch.testing.assert_close(weights[other][name], tensor, atol=self.weight_atol, rtol=0, msg=name)

    def test_samples_that_belong_together_are_in_one_micro_batch(self, model_path: Path) -> None:
        batch, weights = make_pairs(), []
        for size in (1000, 60, 1):
            engine = self.engine(model_path, max_tokens=size, optim=OptimSettings(lr=1.0, eps=1.0, clip_grad=None))
            metrics = engine.train(batch, PairMargin()).to_dict()
            assert metrics["pairs"] == 4
            assert metrics["grad_norm"] > 0
            weights.append(exported(engine))
        for other in (1, 2):
            for name, tensor in weights[0].items():
                torch.testing.assert_close(weights[other][name], tensor, atol=self.weight_atol, rtol=0, msg=name)

    def test_two_runs_are_identical(self, model_path: Path) -> None:
        engines = [self.engine(model_path) for _ in range(2)]
        for step in range(2):
            first, second = (engine.train(make_batch(seed=step), WeightedLogprobs()).to_dict() for engine in engines)
            assert first == second
        first_weights, second_weights = map(exported, engines)
        assert all(torch.equal(first_weights[name], second_weights[name]) for name in first_weights)

    @pytest.mark.parametrize("scale", [float("inf"), float("nan")])
    def test_a_step_without_finite_gradient_is_skipped(self, model_path: Path, scale: float) -> None:
        optim = OptimSettings(lr=1e-2, warmup_steps=4)
        engine, control = self.engine(model_path, optim=optim), self.engine(model_path, optim=optim)
        before = exported(engine)
        metrics = engine.train(make_batch(), WeightedLogprobs(scale=scale)).to_dict()
        assert metrics["skipped_steps"] == 1
        assert metrics["lr"] == pytest.approx(2.5e-3)
        after = exported(engine)
        assert all(torch.equal(after[name], before[name]) for name in before)
        # A skipped step counts for the schedule and does not change the optimizer.
        metrics = engine.train(make_batch(), WeightedLogprobs()).to_dict()
        assert metrics["lr"] == pytest.approx(5e-3)
        control.train(make_batch(), WeightedLogprobs(scale=scale))
        assert control.train(make_batch(), WeightedLogprobs()).to_dict() == metrics
        assert all(torch.isfinite(tensor).all() for tensor in exported(engine).values())

    def test_samples_without_gradient_are_fine(self, model_path: Path) -> None:
        engine, batch = self.engine(model_path), make_batch()
        before = exported(engine)
        metrics = engine.train(batch, WeightedLogprobs(scale=0.0)).to_dict()
        assert metrics["grad_norm"] == 0
        assert metrics["skipped_steps"] == 0
        after = exported(engine)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_a_frozen_engine_does_not_train(self, model_path: Path) -> None:
        with pytest.raises(EngineError, match="optimizer"):
            self.engine(model_path, optim=None).train(make_batch(), WeightedLogprobs())

    def test_a_step_that_broke_off_leaves_nothing(self, model_path: Path) -> None:
        """The next step equals that of an engine without the failed step, or is refused."""
        engine, control = self.engine(model_path), self.engine(model_path)
        with pytest.raises(RuntimeError, match="broken objective"):
            engine.train(make_batch(), BreaksOff())
        batch = make_batch(seed=1)
        expected = control.train(batch, WeightedLogprobs()).to_dict()
        try:
            metrics = engine.train(batch, WeightedLogprobs()).to_dict()
        except EngineError:
            return
        assert metrics == expected

    def test_a_schedule_that_falls_needs_its_length(self, model_path: Path) -> None:
        with pytest.raises(EngineError, match="total_steps"):
            self.engine(model_path, optim=OptimSettings(schedule="cosine"))
        with pytest.raises(EngineError, match="total_steps"):
            self.engine(model_path, optim=OptimSettings(warmup_ratio=0.1))
