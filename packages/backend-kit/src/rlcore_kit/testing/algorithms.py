"""Conformance suites for advantage estimators and policy losses.

A module of tests, which imports what registers the function, holds::

    class TestMine(AdvantageConformance):
        name = "mine"

    class TestMyLoss(PolicyLossConformance):
        name = "my_loss"
        params = {"clip": 0.1}

pytest then checks the contracts of `rlcore.algorithms.registries` on ragged batches: sequences without tokens, without
trained tokens, and with one token; groups of several sizes whose samples are not adjacent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from rlcore.algorithms.objectives import PolicyObjective, PolicyObjectiveSettings
from rlcore.algorithms.registries import Advantages, PolicyLossInputs, advantages, policy_losses
from rlcore.algorithms.sequences import trained_mask
from rlcore.batch import Batch, Jagged
from rlcore.config import Algorithm
from rlcore.config.registry import Registry
from rlcore.engines.reward import RewardResult
from rlcore.metrics import Metrics

LENGTHS = (6, 0, 9, 1, 5, 7, 3, 8, 4)
GROUPS = (4, 7, 4, 2, 7, 2, 4, 7, 2)
POLICIES = ("old_logprobs", "ref_logprobs", "rollout_logprobs")
PER_TOKEN = (*POLICIES, "advantages", "entropy", "values", "returns", "process_rewards")


def algorithm_batch(seed: int, lengths: Sequence[int] = LENGTHS, groups: Sequence[int] = GROUPS) -> Batch:
    """Make samples with every numeric column of the recipes in fp32, and two columns of objects.

    About a third of the tokens is masked. The last sample has no trained token. Only trained tokens have rewards.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    total, samples = int(sizes.sum()), len(lengths)
    mask = (torch.rand(total, generator=generator) < 0.7).float()
    if samples:
        mask[total - lengths[-1] :] = 0
    batch = Batch({"loss_mask": Jagged(mask, sizes)})
    trained = trained_mask(batch)
    tokens: dict[str, torch.Tensor] = {
        "tokens": torch.randint(5, 250, (total,), generator=generator),
        "token_rewards": torch.randn(total, generator=generator) * trained,
        **{name: torch.randn(total, generator=generator) / 2 for name in PER_TOKEN},
        "turn_state": torch.arange(total) % 3,
    }
    scores = torch.rand(samples, generator=generator)
    return batch.with_columns(
        **{name: batch.jagged(values) for name, values in tokens.items()},
        group=torch.tensor(groups, dtype=torch.int64),
        score=scores,
        baseline_score=torch.rand(samples, generator=generator),
        sample_weight=torch.rand(samples, generator=generator),
        reward_result=[RewardResult(score, {"part/score": 1 - score}) for score in scores.tolist()],
        extra=[{"row": row} for row in range(samples)],
    )


class _AlgorithmConformance:
    """Base of the suites."""

    registry: ClassVar[Registry[Any]]
    name: str
    """Name under which the function is registered."""
    params: Mapping[str, Any] = {}
    """Parameters that differ from their defaults."""
    tolerance: float = 1e-5
    """Maximum difference, absolute and relative, where samples are in another order."""

    def batch(self, seed: int) -> Batch:
        """Return the samples of the tests; override it to add columns to `algorithm_batch`."""
        return algorithm_batch(seed)

    @property
    def algorithm(self) -> Algorithm:
        """The function under test, with its parameters."""
        entry = self.registry.get(self.name)
        return Algorithm(entry, entry.params.model_validate(dict(self.params)))

    def close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Compare two tensors within `tolerance`."""
        torch.testing.assert_close(found, expected, rtol=self.tolerance, atol=self.tolerance)

    def test_is_found_by_its_name_in_other_processes(self) -> None:
        assert copy(self.algorithm) == self.algorithm, (
            "a copy must be found by its name in the registry, as in another process"
        )

    @staticmethod
    def _with_garbage(batch: Batch, garbage: float) -> Batch:
        """Put ``garbage`` on the masked tokens of all floating-point columns except rewards, which may be masked."""
        trained = trained_mask(batch)
        names = [name for name in batch.jagged_names if batch.flat(name).is_floating_point()]
        dirty = {
            name: batch.jagged(batch.flat(name).masked_fill(~trained, garbage))
            for name in names
            if name not in ("loss_mask", "token_rewards")
        }
        return batch.with_columns(**dirty)


class AdvantageConformance(_AlgorithmConformance):
    """The contract of `rlcore.algorithms.registries.AdvantageEstimator`: subclass it and set ``name``."""

    registry = advantages

    def estimate(self, batch: Batch) -> Advantages:
        """Return the estimator's result on the columns of ``batch`` that it declares."""
        entry = self.algorithm.entry
        names = {"tokens", "loss_mask", "token_rewards", "group", *entry.required_columns}
        result: Advantages = self.algorithm(batch.select(*(name for name in batch.names if name in names)))
        return result

    @pytest.mark.parametrize("seed", range(3))
    def test_one_number_per_token_and_none_where_masked(self, seed: int) -> None:
        batch = self.batch(seed)
        result = self.estimate(batch)
        for values in (result.advantages, result.returns):
            if values is not None:
                assert values.shape == (batch.total_tokens,)
                assert values.dtype == torch.float32
                assert bool(values.isfinite().all())
        assert bool((result.advantages[~trained_mask(batch)] == 0).all())

    @pytest.mark.parametrize("seed", range(3))
    def test_the_order_of_samples_does_not_matter(self, seed: int) -> None:
        batch = self.batch(seed)
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
        expected = batch.jagged(self.estimate(batch).advantages).take(order).values
        self.close(self.estimate(batch.take(order)).advantages, expected)

    def test_the_numbers_of_groups_do_not_matter(self) -> None:
        batch = self.batch(0)
        renamed = batch.with_columns(group=1000 - 7 * batch["group"])
        self.close(self.estimate(renamed).advantages, self.estimate(batch).advantages)

    @pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
    def test_masked_values_are_never_read(self, garbage: float) -> None:
        batch = self.batch(0)
        found = self.estimate(self._with_garbage(batch, garbage)).advantages
        assert torch.equal(found, self.estimate(batch).advantages)

    def test_does_not_change_the_batch(self) -> None:
        batch, before = self.batch(0), self.batch(0)
        self.estimate(batch)
        assert batch.select(*batch.jagged_names, "group").equals(before.select(*before.jagged_names, "group"))

    def test_equal_scores_give_no_advantage(self) -> None:
        """Applies to estimators that compare the samples of a group, and not their turns."""
        traits = self.algorithm.entry.traits
        if "compares_group" not in traits or "compares_turns" in traits:
            return
        batch = self.batch(0)
        first = torch.zeros(batch.total_tokens)
        ends = batch.lengths.cumsum(0)[batch.lengths > 0] - 1
        first[ends] = 0.3
        same = batch.filter(batch.lengths > 0)
        columns = {"token_rewards": same.jagged(first), "process_rewards": same.jagged(torch.zeros(same.total_tokens))}
        equal = self.estimate(same.with_columns(**columns)).advantages
        assert float(equal.abs().max()) <= self.tolerance


class PolicyLossConformance(_AlgorithmConformance):
    """The contract of `rlcore.algorithms.registries.PolicyLoss`: subclass it and set ``name``.

    The loss is called as in training engines, by a `PolicyObjective`.
    """

    registry = policy_losses
    aggregation: Any = "seq-mean-token-mean"
    """The aggregation for which the loss is designed, as in the configuration."""

    def evaluate(
        self, batch: Batch, denominators: Mapping[str, float] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Metrics, torch.Tensor]:
        """Compute the loss of ``batch``.

        Args:
            denominators: those of the mini-batch of which ``batch`` is a part; None takes those of ``batch``.

        Returns:
            the loss, its gradient ``[T]`` with respect to log-probs, metrics, and the losses ``[T]`` of tokens.
        """
        entry = self.algorithm.entry
        losses: list[torch.Tensor] = []

        def spied(inputs: PolicyLossInputs, params: Any) -> tuple[torch.Tensor, Metrics]:
            found, metrics = entry.function(inputs, params)
            losses.append(found.detach())
            return found, metrics

        watched = Algorithm(replace(entry, function=spied), self.algorithm.params)
        objective = PolicyObjective(PolicyObjectiveSettings(policy_loss=watched, aggregation=self.aggregation))
        names = {"tokens", "loss_mask", "advantages", "old_logprobs", *entry.required_columns} - {"entropy"}
        outputs: dict[str, torch.Tensor] = {
            name: batch.flat(f"model/{name}").clone().requires_grad_() for name in objective.request.outputs
        }
        mine = batch.select(*(name for name in batch.names if name in names))
        sums = objective.denominators(mine) if denominators is None else denominators
        loss, metrics = objective.loss(outputs, mine, sums)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient = outputs["logprobs"].grad
        assert gradient is not None, "the loss has no gradient with respect to the log-probs"
        return loss.detach(), gradient, metrics, losses[0]

    def samples(self, seed: int) -> Batch:
        """Return `batch` with the outputs of a model, whose log-probs are close to the old ones."""
        batch = self.batch(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        noise = torch.randn(batch.total_tokens, generator=generator) / 4
        entropy = torch.rand(batch.total_tokens, generator=generator)
        outputs = {"model/logprobs": batch.flat("old_logprobs") + noise, "model/entropy": entropy}
        return batch.with_columns(**{name: batch.jagged(values) for name, values in outputs.items()})

    @pytest.mark.parametrize("seed", range(3))
    def test_one_number_per_token_and_a_gradient_where_trained(self, seed: int) -> None:
        batch = self.samples(seed)
        loss, gradient, metrics, losses = self.evaluate(batch)
        assert losses.shape == (batch.total_tokens,)
        assert bool(losses.isfinite().all())
        assert math.isfinite(float(loss))
        assert all(math.isfinite(value) for value in metrics.to_dict().values())
        masked = ~trained_mask(batch)
        assert bool((losses[masked] == 0).all())
        assert bool((gradient[masked] == 0).all())
        assert float(gradient.abs().max()) > 0

    @pytest.mark.parametrize("seed", range(3))
    def test_the_order_of_samples_does_not_matter(self, seed: int) -> None:
        batch = self.samples(seed)
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
        loss, gradient, metrics, _ = self.evaluate(batch)
        shuffled = self.evaluate(batch.take(order))
        self.close(shuffled[0], loss)
        self.close(shuffled[1], batch.jagged(gradient).take(order).values)
        assert shuffled[2].to_dict() == pytest.approx(metrics.to_dict(), rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("budget", [1, 12, 25])
    def test_the_division_into_micro_batches_does_not_matter(self, budget: int) -> None:
        """Samples with the same value in the column ``together`` are in one micro-batch, as in training engines."""
        batch = self.samples(0)
        loss, gradient, metrics, _ = self.evaluate(batch)
        parts = batch.micro_batches(budget, self.algorithm.entry.together)
        sums = PolicyObjective(PolicyObjectiveSettings()).denominators(batch)
        shares = [self.evaluate(batch.take(part), sums) for part in parts]
        self.close(torch.stack([share[0] for share in shares]).sum(), loss)
        order = torch.tensor([index for part in parts for index in part])
        self.close(torch.cat([share[1] for share in shares]), batch.jagged(gradient).take(order).values)
        merged = Metrics.merge(share[2] for share in shares).to_dict()
        assert merged == pytest.approx(metrics.to_dict(), rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
    def test_masked_values_are_never_read(self, garbage: float) -> None:
        batch = self.samples(0)
        clean, dirty = self.evaluate(batch), self.evaluate(self._with_garbage(batch, garbage))
        assert all(torch.equal(found, expected) for found, expected in zip(dirty[:2], clean[:2]))
        assert dirty[2].to_dict() == clean[2].to_dict()

    def test_samples_without_trained_tokens_have_no_loss(self) -> None:
        batch = self.samples(0)
        nothing = batch.with_columns(loss_mask=batch.jagged(torch.zeros(batch.total_tokens)))
        loss, gradient, _, _ = self.evaluate(nothing)
        assert float(loss) == 0
        assert float(gradient.abs().max()) == 0

    def test_does_not_change_its_inputs(self) -> None:
        batch, before = self.samples(0), self.samples(0)
        self.evaluate(batch)
        names = [*batch.jagged_names, "group", "score"]
        assert batch.select(*names).equals(before.select(*names))

    def test_vanishes_with_the_advantage(self) -> None:
        """Applies to losses that declare it: runs drop samples without advantage then."""
        if "vanishes_with_advantage" not in self.algorithm.entry.traits:
            return
        batch = self.samples(0)
        loss, gradient, _, losses = self.evaluate(
            batch.with_columns(advantages=batch.jagged(torch.zeros(batch.total_tokens)))
        )
        assert float(loss) == 0
        assert float(gradient.abs().max()) == 0
        assert float(losses.abs().max()) == 0
