"""The conformance suites of algorithms must fail functions that break the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlcore.algorithms import Advantages, PolicyLossInputs, advantages, policy_losses
from rlcore.algorithms.sequences import per_token, sequence_sums, trained_mask
from rlcore.batch import Batch
from rlcore.errors import BatchError
from rlcore.metrics import Metrics
from rlcore_kit.testing import algorithms


def scores(batch: Batch) -> torch.Tensor:
    return per_token(sequence_sums(batch.flat("token_rewards"), batch.lengths), batch.lengths)


def writes(batch: Batch) -> torch.Tensor:
    batch.flat("token_rewards").mul_(2)
    return scores(batch) * trained_mask(batch)


def records_a_mean_without_weight(inputs: PolicyLossInputs) -> tuple[torch.Tensor, Metrics]:
    metrics = Metrics()
    metrics.mean("size", float(len(inputs.logprobs)))
    return -inputs.logprobs * inputs.advantages, metrics


Estimate = Callable[[Batch], torch.Tensor]
ESTIMATORS: dict[str, tuple[Estimate, str, tuple[Any, ...]]] = {
    "counts what is masked": (
        lambda batch: trained_mask(batch) * (scores(batch) - batch.flat("values").mean()),
        "test_masked_values_are_never_read",
        (float("nan"),),
    ),
    "trains on the prompt": (
        lambda batch: scores(batch) + 1,
        "test_one_number_per_token_and_none_where_masked",
        (0,),
    ),
    "looks at neighbours": (
        lambda batch: trained_mask(batch) * scores(batch).roll(4),
        "test_the_order_of_samples_does_not_matter",
        (0,),
    ),
    "takes groups for weights": (
        lambda batch: trained_mask(batch) * scores(batch) * per_token(batch["group"].float(), batch.lengths),
        "test_the_numbers_of_groups_do_not_matter",
        (),
    ),
    "reads what it does not declare": (
        lambda batch: trained_mask(batch) * batch.flat("ref_logprobs"),
        "test_one_number_per_token_and_none_where_masked",
        (0,),
    ),
    "writes into the batch": (writes, "test_does_not_change_the_batch", ()),
    "trains on equal scores": (
        lambda batch: trained_mask(batch) * scores(batch),
        "test_equal_scores_give_no_advantage",
        (),
    ),
}
Loss = Callable[[PolicyLossInputs], tuple[torch.Tensor, Metrics]]
LOSSES: dict[str, tuple[Loss, str, tuple[Any, ...]]] = {
    "normalises itself": (
        lambda inputs: (-inputs.logprobs * inputs.advantages / inputs.mask.sum().clamp(min=1), Metrics()),
        "test_the_division_into_micro_batches_does_not_matter",
        (12,),
    ),
    "is reduced already": (
        lambda inputs: ((-inputs.logprobs * inputs.advantages).sum(), Metrics()),
        "test_one_number_per_token_and_a_gradient_where_trained",
        (0,),
    ),
    "records a mean without its weight": (
        records_a_mean_without_weight,
        "test_the_division_into_micro_batches_does_not_matter",
        (12,),
    ),
    "is not 0 where it says": (
        lambda inputs: (inputs.mask * (inputs.advantages - inputs.logprobs), Metrics()),
        "test_vanishes_with_the_advantage",
        (),
    ),
    "trains on the prompt": (
        lambda inputs: (1 - inputs.logprobs * inputs.advantages, Metrics()),
        "test_one_number_per_token_and_a_gradient_where_trained",
        (0,),
    ),
}


class Estimator(algorithms.AdvantageConformance):
    name = "faulty"


class PolicyLoss(algorithms.PolicyLossConformance):
    name = "faulty"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (advantages, policy_losses):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.mark.parametrize("fault", ESTIMATORS)
def test_a_faulty_estimator_fails(fault: str) -> None:
    estimate, test, arguments = ESTIMATORS[fault]
    register = advantages.register("faulty", required_columns={"values"}, traits={"compares_group"})
    register(lambda batch, params: Advantages(estimate(batch)))
    with pytest.raises((AssertionError, BatchError)):
        getattr(Estimator(), test)(*arguments)


@pytest.mark.parametrize("fault", LOSSES)
def test_a_faulty_loss_fails(fault: str) -> None:
    loss, test, arguments = LOSSES[fault]
    policy_losses.register("faulty", traits={"vanishes_with_advantage"})(lambda inputs, params: loss(inputs))
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        getattr(PolicyLoss(), test)(*arguments)


del algorithms
