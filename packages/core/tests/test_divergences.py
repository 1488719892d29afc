"""Divergences against plain fp64: their ends, their tail bucket, their gradients."""

from __future__ import annotations

import pytest
import torch

from rlcore.algorithms.distillation import GIVEN, DistillObjective, DistillObjectiveSettings
from rlcore.algorithms.divergence import bucketed
from rlcore.algorithms.registries import divergences
from rlcore.batch import Batch, Jagged
from rlcore.config import Algorithm

KINDS = [{"name": "reverse-kl"}, {"name": "forward-kl"}, *({"name": "jsd", "beta": b} for b in (0, 0.1, 0.5, 0.9, 1))]


def divergence(kind: dict[str, object]) -> Algorithm:
    entry = divergences.get(str(kind["name"]))
    return Algorithm(entry, entry.params.model_validate({k: v for k, v in kind.items() if k != "name"}))


def distributions(spread: float = 2.0, vocabulary: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(2, 40, vocabulary, generator=generator, dtype=torch.float64)
    student, teacher = logits.log_softmax(-1)
    return student, teacher


def plain_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of log-probs by torch."""
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_divergence_is_that_of_its_formula_and_zero_only_between_equals(kind: dict[str, float]) -> None:
    student, teacher = distributions()
    found = divergence(kind)(student, teacher).sum(-1)
    beta = {"reverse-kl": 1, "forward-kl": 0}.get(str(kind["name"]), kind.get("beta"))
    if beta in (0, 1):
        expected = plain_kl(student, teacher) if beta else plain_kl(teacher, student)
    else:
        mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
        expected = beta * plain_kl(teacher, mixture) + (1 - beta) * plain_kl(student, mixture)
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()
    assert divergence(kind)(student, student).sum(-1).abs().max() < 1e-15


def test_the_ends_of_jsd_are_the_two_kls_and_not_the_limits_of_the_formula() -> None:
    student, teacher = distributions()
    near = divergence({"name": "jsd", "beta": 1 - 1e-6})(student, teacher).sum(-1)
    end = divergence({"name": "jsd", "beta": 1})(student, teacher).sum(-1)
    assert near.max() < 1e-4 < end.min()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_buckets_never_give_less_than_zero_nor_more_than_the_vocabulary(kind: dict[str, float], k: int) -> None:
    student, teacher = distributions()
    ids = teacher.topk(k).indices
    buckets = (bucketed(log.float().gather(-1, ids)).double() for log in (student, teacher))
    found, full = divergence(kind)(*buckets).sum(-1), divergence(kind)(student, teacher).sum(-1)
    assert (found > -1e-6).all()
    assert (found < full + 1e-6).all()  # merging buckets loses information
    if k == 12:
        torch.testing.assert_close(found, full, atol=2e-6, rtol=1e-5)


def test_mass_outside_of_the_best_tokens_is_penalised() -> None:
    """Equal on the k best tokens up to a factor: without the bucket of all others the reverse KL is below 0 here."""
    teacher = torch.tensor([[0.45, 0.45, 0.05, 0.05]]).log()
    student = torch.tensor([[0.05, 0.05, 0.45, 0.45]]).log().requires_grad_()
    ids = torch.tensor([[0, 1]])
    top = student.gather(-1, ids), teacher.gather(-1, ids)
    reverse = divergence({"name": "reverse-kl"})
    assert float(reverse(*top).detach().sum()) < 0
    loss = reverse(*(bucketed(log) for log in top)).sum()
    assert float(loss.detach()) > 0
    (grad,) = torch.autograd.grad(loss, student)
    assert (grad[0, :2] < 0).all()  # more mass on the teacher's tokens


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_gradients_are_close_to_fp64_where_models_agree_and_where_they_are_certain(
    kind: dict[str, float], spread: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    base = 3 * torch.randn(20, 50, generator=generator, dtype=torch.float64)
    logits = base + spread * torch.randn(20, 50, generator=generator, dtype=torch.float64)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        own = logits.to(dtype, copy=True).requires_grad_()
        divergence(kind)(own.log_softmax(-1), base.to(dtype).log_softmax(-1)).sum().backward()
        assert own.grad is not None
        return own.grad.double()

    exact, single = gradient(torch.float64), gradient(torch.float32)
    assert torch.isfinite(single).all()
    assert (single - exact).norm() < 5e-3 * exact.norm()


def test_one_certain_token_has_a_finite_gradient() -> None:
    for certain in (0.0, -1e-7):
        top = torch.tensor([[certain, -40.0]], requires_grad=True)
        divergence({"name": "forward-kl"})(bucketed(top), bucketed(torch.tensor([[-0.5, -3.0]]))).sum().backward()
        assert torch.isfinite(top.grad).all()


def settings(**changes: object) -> DistillObjectiveSettings:
    return DistillObjectiveSettings.model_validate({"divergence": {"top_k": 2}, **changes})


def micro_batch(seed: int = 0) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Four sequences, of which the last two are given by the data set; and what the model computed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (4, 6, 3, 5)
    tokens = Jagged.from_list([torch.arange(n) for n in lengths])
    mask = torch.cat([(torch.arange(n) >= 2).float() for n in lengths])
    given = mask * torch.cat([torch.full((n,), float(row >= 2)) for row, n in enumerate(lengths)])
    teacher, student = torch.randn(2, len(mask), 5, generator=generator).log_softmax(-1)
    batch = Batch({"tokens": tokens}).with_columns(loss_mask=tokens.with_values(mask))
    batch = batch.with_columns(
        teacher_top_logprobs=batch.jagged(teacher[:, :2]),
        teacher_top_ids=batch.jagged(torch.zeros(len(mask), 2, dtype=torch.int64)),
        **{GIVEN: batch.jagged(given)},
    )
    return batch, {"candidate_logprobs": student[:, :2], "logprobs": student[:, 0]}


def test_the_likelihood_is_of_given_completions_alone() -> None:
    batch, outputs = micro_batch()
    objective = DistillObjective(settings(nll_coeff=0.5))
    assert set(objective.request.outputs) == {"logprobs", "candidate_logprobs"}
    own = outputs["logprobs"].clone().requires_grad_()
    loss, metrics = objective.loss({**outputs, "logprobs": own}, batch, objective.denominators(batch))
    loss.backward()
    given = batch.flat(GIVEN)
    torch.testing.assert_close(own.grad, -0.5 * given / given.sum())
    assert metrics["nll"].value == pytest.approx(float(-(own.detach() * given).sum() / given.sum()), rel=1e-6)
    assert metrics["nll"].value != 0
    assert metrics["divergence"].value > 0
    assert 0 < metrics["teacher_top_mass"].value < 1
    total = metrics["divergence"].value + 0.5 * metrics["nll"].value
    assert metrics["loss"].value == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_losses_do_not_depend_on_micro_batches(aggregation: str) -> None:
    batch, outputs = micro_batch()
    objective = DistillObjective(settings(nll_coeff=0.3, aggregation=aggregation))
    whole, _ = objective.loss(outputs, batch, objective.denominators(batch))
    columns = batch.with_columns(**{name: batch.jagged(values) for name, values in outputs.items()})
    shares = []
    for rows in ([0], [3, 1], [2]):
        part = columns.take(rows)
        computed = {name: part.flat(name) for name in outputs}
        shares.append(objective.loss(computed, part, objective.denominators(batch))[0])
    torch.testing.assert_close(torch.stack(shares).sum(), whole)


def test_a_term_without_weight_asks_for_nothing() -> None:
    assert DistillObjective(settings(divergence={"coeff": 0}, nll_coeff=1)).request.outputs == ("logprobs",)
    assert DistillObjective(settings(), policy=True).request.outputs == ("logprobs", "entropy", "candidate_logprobs")
