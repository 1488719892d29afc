"""Columns of `TrainEngine.forward` against plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest
from rlcore.errors import EngineError
from rlcore.progress import listening
from rlcore_kit.testing.train_engine.base import TrainEngineTests
from rlcore_kit.testing.train_engine.batches import make_batch, reference_outputs


class ForwardTests(TrainEngineTests):
    """`TrainEngine.forward` of a policy."""

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_forward_equals_plain_transformers(self, model_path: Path, temperature: float) -> None:
        batch, model = make_batch(), self.reference(model_path)
        out = self.engine(model_path, optim=None).forward(batch, ForwardRequest(("logprobs", "entropy"), temperature))
        assert out.names == ("logprobs", "entropy")
        assert torch.equal(out.lengths, batch.lengths)
        for row, result in zip(batch.rows(), out.rows()):
            logprobs, entropy = reference_outputs(model, row["tokens"], temperature)
            torch.testing.assert_close(result["logprobs"], logprobs * row["loss_mask"], atol=self.logprob_atol, rtol=0)
            torch.testing.assert_close(result["entropy"], entropy * row["loss_mask"], atol=self.logprob_atol, rtol=0)
        assert {column.values.dtype for column in (out["logprobs"], out["entropy"])} == {torch.float32}
        assert out.flat("logprobs").device.type == "cpu"
        assert not out.flat("logprobs").requires_grad

    def test_forward_without_a_mask_computes_all_but_first_tokens(self, model_path: Path) -> None:
        batch, model = make_batch().select("tokens"), self.reference(model_path)
        out = self.engine(model_path).forward(batch, ForwardRequest())
        for row, result in zip(batch.rows(), out.rows()):
            logprobs, _ = reference_outputs(model, row["tokens"])
            torch.testing.assert_close(result["logprobs"], logprobs, atol=self.logprob_atol, rtol=0)

    def test_forward_is_exactly_zero_where_masked(self, model_path: Path) -> None:
        batch = make_batch()
        out = self.engine(model_path).forward(batch, ForwardRequest(("logprobs", "entropy")))
        for name in out.names:
            assert (out.flat(name)[batch.flat("loss_mask") == 0] == 0).all()
            assert (out.flat(name)[batch.flat("loss_mask") == 1] != 0).all()

    def test_forward_does_not_depend_on_micro_batches(self, model_path: Path) -> None:
        batch = make_batch()
        wide, narrow = (self.engine(model_path, max_tokens=size).forward(batch, ForwardRequest()) for size in (1000, 1))
        torch.testing.assert_close(wide.flat("logprobs"), narrow.flat("logprobs"), atol=self.logprob_atol, rtol=0)

    def test_an_engine_that_knows_its_memory_takes_a_token_budget(self, model_path: Path) -> None:
        engine, batch, heard = self.engine(model_path, max_tokens=1000), make_batch(), []
        memory = engine.step_memory()
        if memory is None:
            return
        assert memory.free > 0
        assert memory.per_token > 0
        before = engine.forward(batch, ForwardRequest())
        engine.set_token_budget(1)
        with listening(lambda what, done, total: heard.append(total)):
            after = engine.forward(batch, ForwardRequest())
        torch.testing.assert_close(before.flat("logprobs"), after.flat("logprobs"), atol=self.logprob_atol, rtol=0)
        assert set(heard) <= {len(batch)}  # of engines that report their micro-batches: one for each sequence

    def test_forward_of_nothing_is_nothing(self, model_path: Path) -> None:
        out = self.engine(model_path).forward(make_batch().take([]), ForwardRequest())
        assert len(out) == 0
        assert out.names == ("logprobs",)

    def test_a_head_refuses_what_it_cannot_compute(self, model_path: Path) -> None:
        with pytest.raises(EngineError, match="values"):
            self.engine(model_path).forward(make_batch(), ForwardRequest(("values",)))
        with pytest.raises(EngineError, match="logprobs"):
            self.engine(model_path, head="value").forward(make_batch(), ForwardRequest(("logprobs",)))

    def test_an_engine_without_adapters_cannot_leave_them_out(self, model_path: Path) -> None:
        with pytest.raises(EngineError, match="adapters"):
            self.engine(model_path).forward(make_batch(), ForwardRequest(adapters=False))

    def test_tokens_outside_the_vocabulary_are_refused(self, model_path: Path) -> None:
        batch = Batch({"tokens": Jagged.from_list([torch.tensor([5, 9999])])})
        with pytest.raises(EngineError, match="vocabulary"):
            self.engine(model_path).forward(batch, ForwardRequest())
