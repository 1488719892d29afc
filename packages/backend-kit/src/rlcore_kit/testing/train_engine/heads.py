"""Value and score heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest
from rlcore_kit.testing.train_engine.base import TrainEngineTests
from rlcore_kit.testing.train_engine.batches import make_batch
from rlcore_kit.testing.train_engine.objectives import SquaredError


class HeadTests(TrainEngineTests):
    """Engines with a scalar head."""

    @pytest.mark.parametrize("head", ["value", "score"])
    def test_scalar_heads_read_the_right_state(self, heads: dict[str, Path], head: str) -> None:
        """A value is read before its token, a score at its token: a changed token affects only later entries."""
        engine = self.engine(heads[head], head=head)
        tokens = torch.arange(10, 22)
        changed = tokens.clone()
        changed[6] = 99
        batch = Batch({"tokens": Jagged.from_list([tokens, changed])})
        first, second = (row["values"] for row in engine.forward(batch, ForwardRequest(("values",))).rows())
        sees = 6 if head == "score" else 7
        differs = (first - second).abs() > 1e-7
        assert not differs[:sees].any()
        assert differs[sees:].all()
        assert first[0] == 0
        assert (first[1:] != 0).all()  # shift allowed: all but the first token

    def test_new_heads_come_from_the_seed(self, model_path: Path) -> None:
        batch, request = make_batch(), ForwardRequest(("values",))
        torch.manual_seed(1)
        a = self.engine(model_path, head="value", seed=3).forward(batch, request)
        torch.manual_seed(2)
        b = self.engine(model_path, head="value", seed=3).forward(batch, request)
        c = self.engine(model_path, head="value", seed=4).forward(batch, request)
        assert torch.equal(a.flat("values"), b.flat("values"))
        assert not torch.equal(a.flat("values"), c.flat("values"))

    @pytest.mark.parametrize("head", ["value", "score"])
    def test_scalar_heads_learn_and_survive_a_round_trip(
        self, heads: dict[str, Path], tmp_path: Path, head: str
    ) -> None:
        engine, batch, request = self.engine(heads[head], head=head), make_batch(), ForwardRequest(("values",))
        losses = [engine.train(batch, SquaredError()).to_dict()["loss"] for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]
        engine.save_pretrained(tmp_path / "out")
        again = self.engine(tmp_path / "out", head=head, optim=None)
        first, second = (e.forward(batch, request).flat("values") for e in (engine, again))
        torch.testing.assert_close(second, first, atol=self.logprob_atol, rtol=0)
