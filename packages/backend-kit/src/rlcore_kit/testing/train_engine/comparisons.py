"""Outputs that compare a model with another one, against plain transformers in fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcore.algorithms.divergence import forward_kl, reverse_kl
from rlcore.batch import Batch, Jagged
from rlcore.config.registry import NoParams
from rlcore.engines import Comparison, ForwardRequest, OptimSettings, OutputLayer
from rlcore.engines.train import Output
from rlcore.errors import EngineError
from rlcore.metrics import Metrics
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_kit.testing.train_engine.base import TrainEngineTests
from rlcore_kit.testing.train_engine.batches import exported, make_batch

TEMPERATURE = 0.8
SHARED = 255  # token ids of the comparison, fewer than either model has


def reverse_terms(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the summands of KL(own ‖ other)."""
    return reverse_kl(own, other, NoParams())


def forward_terms(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the summands of KL(other ‖ own)."""
    return forward_kl(own, other, NoParams())


@dataclasses.dataclass(frozen=True)
class SumOf:
    """Loss ``Σ output / N``, of one output."""

    request: ForwardRequest

    def denominators(self, batch: Batch) -> dict[str, float]:
        """Return the number of trained tokens."""
        return {"tokens": float(batch.flat("loss_mask").sum())}

    def loss(
        self, outputs: Mapping[str, torch.Tensor], batch: Batch, denominators: Mapping[str, float]
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the sum of the output, in which entry k of a token has the weight k + 1."""
        (name,) = self.request.outputs
        weights = torch.arange(1.0, 1.0 + (outputs[name].shape[-1] if outputs[name].dim() > 1 else 1))
        loss = (outputs[name].reshape(batch.total_tokens, -1) * weights).sum() / denominators["tokens"]
        metrics = Metrics()
        metrics.sum("loss", loss)
        return loss, metrics


class ComparisonTests(TrainEngineTests):
    """The outputs of `ForwardRequest` that distillation needs."""

    @pytest.fixture(scope="class")
    @classmethod
    def teacher_path(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Write another tiny policy, with a padded vocabulary, and return its folder."""
        folder = tmp_path_factory.mktemp("teacher")
        return tiny_model(folder, architecture=cls.architecture, vocab_size=300, seed=3)

    @torch.no_grad()
    def _logprobs(self, path: Path, batch: Batch, vocabulary: int | None = None) -> torch.Tensor:
        """Return log-probs ``[T, vocabulary]`` in fp64 of the token after each prefix; 0 for first tokens."""
        model, rows = self.reference(path).double(), []
        for tokens in batch["tokens"].to_list():
            logits = model(tokens[None], use_cache=False).logits[0, :-1, :vocabulary]  # shift allowed: reference
            logprobs = (logits / TEMPERATURE).log_softmax(-1)
            rows.append(torch.cat([logprobs.new_zeros(1, logprobs.shape[-1]), logprobs]))
        return torch.cat(rows)

    @pytest.mark.parametrize("vocabulary", [None, SHARED])
    def test_the_most_likely_tokens_are_those_of_plain_transformers(
        self, teacher_path: Path, vocabulary: int | None
    ) -> None:
        batch = make_batch()
        outputs: tuple[Output, ...] = ("top_ids", "top_logprobs", "logprobs")
        request = ForwardRequest(outputs, TEMPERATURE, top_k=7, vocabulary=vocabulary)
        found = self.engine(teacher_path, optim=None).forward(batch, request)
        expected, mask = self._logprobs(teacher_path, batch, vocabulary), batch.flat("loss_mask").bool()
        mask = mask & (expected != 0).any(-1)
        values, ids = expected[mask].topk(7)
        assert found.flat("top_ids").dtype == torch.int64
        assert torch.equal(found.flat("top_ids")[mask], ids)
        close: dict[str, Any] = {"atol": self.logprob_atol, "rtol": 0, "check_dtype": False}
        torch.testing.assert_close(found.flat("top_logprobs")[mask], values, **close)
        chosen = expected.gather(-1, batch.flat("tokens")[:, None])[:, 0]
        torch.testing.assert_close(found.flat("logprobs")[mask], chosen[mask], **close)
        for name in found.names:
            assert not found.flat(name)[~mask].any()

    @pytest.mark.parametrize("terms", [reverse_terms, forward_terms])
    def test_a_divergence_and_its_gradient_are_those_of_full_distributions(
        self, model_path: Path, teacher_path: Path, terms: Callable[..., torch.Tensor]
    ) -> None:
        batch, teacher = make_batch(), self.engine(teacher_path, optim=None)
        student = self.engine(model_path, max_tokens=41, optim=OptimSettings(lr=1.0, eps=1.0, clip_grad=None))
        states = teacher.forward(batch, ForwardRequest(("states",), TEMPERATURE))["states"]
        batch = batch.with_columns(teacher_states=states)
        comparison = Comparison(terms, "teacher_states", "teacher", SHARED)
        request = ForwardRequest(("divergence",), TEMPERATURE, comparison=comparison)
        with pytest.raises(EngineError, match="holds no output layer 'teacher'"):
            student.forward(batch, request)
        student.hold_output_layer("teacher", teacher.output_layer())
        found = student.forward(batch, request).flat("divergence")
        theirs = self._logprobs(teacher_path, batch, SHARED)
        expected = terms(self._logprobs(model_path, batch, SHARED), theirs).sum(-1) * batch.flat("loss_mask")
        torch.testing.assert_close(found, expected.float(), atol=self.logprob_atol, rtol=1e-4)

        before = exported(student)
        student.train(batch, SumOf(request))
        model = self.reference(model_path).double()
        total = torch.zeros((), dtype=torch.float64)
        for row, other in zip(batch.rows(), batch.jagged(theirs).to_list()):
            logits = model(row["tokens"][None], use_cache=False).logits[0, :-1, :SHARED]  # shift allowed: reference
            own = (logits / TEMPERATURE).log_softmax(-1)
            mask = row["loss_mask"][1:]  # shift allowed: reference
            total = total + (terms(own, other[1:]).sum(-1) * mask).sum()  # shift allowed: reference
        (total / float(batch.flat("loss_mask").sum())).backward()  # type: ignore[no-untyped-call]
        self._check_step(before, exported(student), model)

    def test_log_probs_of_candidates_and_their_gradient_are_those_of_plain_transformers(self, model_path: Path) -> None:
        batch = make_batch()
        ids = torch.randint(250, (batch.total_tokens, 3), generator=torch.Generator().manual_seed(1))
        batch = batch.with_columns(ids=batch.jagged(ids))
        engine = self.engine(model_path, max_tokens=41, optim=OptimSettings(lr=1.0, eps=1.0, clip_grad=None))
        request = ForwardRequest(("candidate_logprobs",), TEMPERATURE, candidates="ids")
        found = engine.forward(batch, request).flat("candidate_logprobs")
        mask = batch.flat("loss_mask")[:, None]
        expected = self._logprobs(model_path, batch).gather(-1, ids) * mask
        torch.testing.assert_close(found, expected.float(), atol=self.logprob_atol, rtol=0)

        before = exported(engine)
        engine.train(batch, SumOf(request))
        model = self.reference(model_path).double()
        total = torch.zeros((), dtype=torch.float64)
        for row in batch.rows():
            logits = model(row["tokens"][None], use_cache=False).logits[0, :-1]  # shift allowed: reference
            chosen = (logits / TEMPERATURE).log_softmax(-1).gather(-1, row["ids"][1:])  # shift allowed: reference
            weighted = chosen * torch.arange(1.0, 4.0) * row["loss_mask"][1:, None]  # shift allowed: reference
            total = total + weighted.sum()
        (total / float(mask.sum())).backward()  # type: ignore[no-untyped-call]
        self._check_step(before, exported(engine), model)

    def test_two_passes_of_a_teacher_are_bit_identical(self, teacher_path: Path) -> None:
        engine = self.engine(teacher_path)
        request = ForwardRequest(("logprobs", "top_ids", "top_logprobs", "states"), top_k=5)
        assert engine.forward(make_batch(), request).equals(engine.forward(make_batch(), request))

    def test_what_an_output_is_made_of_must_be_given(self, model_path: Path) -> None:
        engine = self.engine(model_path)
        for name, field in {"top_ids": "top_k", "candidate_logprobs": "candidates", "divergence": "comparison"}.items():
            with pytest.raises(EngineError, match=f"the output {name} needs ForwardRequest.{field}"):
                engine.forward(make_batch(), ForwardRequest((name,)))  # type: ignore[arg-type]
        with pytest.raises(EngineError):
            self.engine(model_path, head="value").output_layer()

    def test_an_output_layer_can_be_forgotten(self, model_path: Path) -> None:
        engine = self.engine(model_path)
        engine.hold_output_layer("other", OutputLayer(torch.zeros(SHARED, 4)))
        engine.hold_output_layer("other", None)
        batch = Batch({"tokens": Jagged.from_list([torch.tensor([5, 9])])})
        batch = batch.with_columns(states=batch.jagged(torch.zeros(2, 4)))
        request = ForwardRequest(("divergence",), comparison=Comparison(reverse_terms, "states", "other", SHARED))
        with pytest.raises(EngineError, match="holds no output layer"):
            engine.forward(batch, request)

    def _check_step(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], model: Any) -> None:
        """Compare a first step of AdamW, which is a function of the gradient alone, with ``model``'s gradients."""
        for name, parameter in model.named_parameters():
            if name in after and parameter.grad is not None:
                gradient = parameter.grad.float()
                expected = -gradient / (gradient.abs() + 1.0)
                torch.testing.assert_close(
                    after[name] - before[name], expected, atol=self.weight_atol, rtol=2e-4, msg=name
                )
