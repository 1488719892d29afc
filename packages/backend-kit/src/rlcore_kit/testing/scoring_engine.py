"""`ScoringEngineConformance`: the contract of scoring engines as tests. Subclass it and return your engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.engines import ScoringEngine, ScoringRequest, TokenScores
from rlcore.errors import EngineError

MOST = 8
"""``top_k`` with which the engine is built."""


class ScoringEngineConformance:
    """The engine's model is ``model``; it was built for sequences of `max_length` tokens, and for `MOST` candidates.

    A subclass defines the fixtures ``model`` (a folder) and ``engine``, both of scope "class" or wider.
    """

    max_length = 96

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, model: Path) -> Any:
        """Load the model in transformers."""
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return loaded.eval()

    def requests(self, reference: Any) -> list[ScoringRequest]:
        """Return sequences of several lengths, starts and numbers of candidates."""
        generator = torch.Generator().manual_seed(0)
        size = reference.config.vocab_size
        shapes = [(2, 1, 0), (24, 1, 3), (40, 31, MOST), (self.max_length, 5, 1), (9, 9, 2), (1, 1, 0)]
        return [
            ScoringRequest(torch.randint(size, (length,), generator=generator).tolist(), start, top_k, str(index))
            for index, (length, start, top_k) in enumerate(shapes)
        ]

    def test_scores_are_those_of_the_model(self, engine: ScoringEngine, reference: Any) -> None:
        """In the order of the requests; for the tokens from ``start`` on, whether candidates or not."""
        requests = self.requests(reference)
        for request, scores in zip(requests, engine.score_batch(requests), strict=True):
            expect_scores(reference, request, scores)

    def test_the_same_request_many_times(self, engine: ScoringEngine, reference: Any) -> None:
        request = self.requests(reference)[1]
        for scores in engine.score_batch([request] * 12):
            expect_scores(reference, request, scores)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": [1] * 97}, "97 tokens"),
            ({"tokens": [1, 10**6]}, "token"),
            ({"tokens": [1, -1]}, "token"),
            ({"top_k": MOST + 1}, "top_k is 9"),
        ],
    )
    def test_impossible_requests_are_refused(self, engine: ScoringEngine, changes: Any, message: str) -> None:
        with pytest.raises(EngineError, match=message):
            engine.score_batch([ScoringRequest(**{"tokens": [1, 2], **changes})])
        assert len(engine.score_batch([ScoringRequest([1, 2])])) == 1


def expect_scores(reference: Any, request: ScoringRequest, scores: TokenScores) -> None:
    """Assert that ``scores`` are those of the model ``reference`` of transformers, within 1e-4."""
    with torch.inference_mode():
        logits = reference(torch.tensor([list(request.tokens)])).logits[0].float()
    # entry t is about the token that follows position start + t - 1
    expected = logits.log_softmax(-1)[request.start - 1 : -1]
    given = torch.tensor(list(request.tokens[request.start :]), dtype=torch.int64)
    torch.testing.assert_close(scores.logprobs, expected.gather(1, given[:, None])[:, 0], atol=1e-4, rtol=0)
    assert scores.top_ids.shape == scores.top_logprobs.shape == (len(given), request.top_k)
    torch.testing.assert_close(scores.top_logprobs, expected.topk(request.top_k).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(expected.gather(1, scores.top_ids), scores.top_logprobs, atol=1e-4, rtol=0)
    assert all(len(set(row)) == request.top_k for row in scores.top_ids.tolist())
