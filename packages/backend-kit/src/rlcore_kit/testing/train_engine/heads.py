"""Value and score heads."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.batch import Batch, Jagged
from rlcore.batch.alignment import last_entries
from rlcore.engines import ForwardRequest
from rlcore.errors import EngineError, RlcoreWarning
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

    @pytest.mark.parametrize("outputs", [1, 3])
    def test_a_new_score_head_is_trained_and_loads_in_transformers(
        self, model_path: Path, tmp_path: Path, outputs: int
    ) -> None:
        """A language model becomes a reward model, whose score of a sequence is that of sequence classification."""
        with pytest.warns(RlcoreWarning, match="scalar head is new"):
            engine = self.engine(model_path, head="score", new_head=True, head_outputs=outputs)
        batch = make_batch((5, 30, 17))
        engine.train(batch, SquaredError())
        scores = last_entries(engine.forward(batch, ForwardRequest(("values",))).flat("values"), batch.lengths)
        engine.save_pretrained(tmp_path / "out")
        transformers: Any = import_module("transformers")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
        model.config.pad_token_id = None  # random tokens may include it, and the score would not be the last token's
        with torch.no_grad():
            expected = torch.cat([model.eval()(tokens[None]).logits for tokens in batch["tokens"].to_list()])
        expected = expected if outputs > 1 else expected[:, 0]
        torch.testing.assert_close(scores, expected, atol=max(1e-5, self.logprob_atol), rtol=0)
        self.engine(tmp_path / "out", head="score", optim=None, head_outputs=outputs)
        with pytest.raises(EngineError, match=f"gives {outputs} labels"):
            self.engine(tmp_path / "out", head="score", optim=None, head_outputs=outputs + 1)
