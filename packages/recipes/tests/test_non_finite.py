"""A number that is not finite costs its sample, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlcore.algorithms import advantages, policy_losses
from rlcore.algorithms.objectives import PolicyObjective, PolicyObjectiveSettings
from rlcore.algorithms.sequences import sequence_sums, trained_mask
from rlcore.batch import Batch, Jagged
from rlcore_recipes.settings import AlgorithmSettings
from rlcore_recipes.step.advantages import NON_FINITE, contained_advantages
from rlcore_recipes.step.non_finite import containment, described
from rlcore_recipes.step.update import mini_batches

LENGTHS = torch.tensor([5, 4, 6, 5, 7, 3])
BAD = 4  # the second of the group 9


def batch_of(**odd: float) -> Batch:
    """Two groups of three; ``odd`` values stand in a trained token, or the row, of the sample `BAD`."""
    random = torch.Generator().manual_seed(0)
    total = int(LENGTHS.sum())
    first = (LENGTHS.cumsum(0) - LENGTHS).tolist()
    mask = torch.ones(total)
    mask[first] = 0
    columns: dict[str, Any] = {
        name: torch.randn(total, generator=random)
        for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values")
    }
    dense: dict[str, Any] = {
        "score": torch.tensor([1.0, 0, 0, 1, 0, 0]),
        "baseline_score": torch.zeros(6),
        "group": torch.tensor([8, 8, 8, 9, 9, 9]),
    }
    for name, value in odd.items():
        (columns | dense)[name][first[BAD] + 2 if name in columns else BAD] = value
    jagged = {name: Jagged(values, LENGTHS) for name, values in columns.items()}
    return Batch({"loss_mask": Jagged(mask, LENGTHS), **jagged, **dense})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "score"])
@pytest.mark.parametrize("estimator", ["grpo", "gae"])
def test_the_others_train_as_if_it_were_not_there(estimator: str, column: str, value: float) -> None:
    algorithm = AlgorithmSettings(advantage=estimator)
    batch = batch_of(**{column: value})
    changed, metrics, _, message = contained_advantages(batch, algorithm, None, 10)
    assert metrics.to_dict()[NON_FINITE] == 1
    assert message.startswith(f"sample {BAD} (prompt 9) has a number in {column} that is not finite; such")
    batch = batch.with_columns(**{name: changed[name] for name in changed.names})
    others = [sample for sample in range(6) if sample != BAD]
    settings = PolicyObjectiveSettings(correction="tis", kl_loss={"coeff": 0.1})
    measured = []
    for part in (batch, batch.take(others)):
        objective = PolicyObjective(settings)
        leaf = (part.flat("values") / 10 - 1).requires_grad_()
        outputs = {"logprobs": leaf, "entropy": leaf * 2}
        loss, recorded = objective.loss(outputs, part, objective.denominators(part))
        loss.backward()
        assert leaf.grad is not None
        per_sample = sequence_sums(leaf.grad, part.lengths)
        measured.append((loss.detach(), per_sample[others] if part is batch else per_sample, recorded.to_dict()))
    torch.testing.assert_close(measured[0][:2], measured[1][:2])
    assert measured[0][2] == pytest.approx(measured[1][2], rel=1e-5, abs=1e-6)
    assert float(measured[0][1].abs().sum()) > 0


def test_a_group_is_compared_without_the_score_that_is_missing() -> None:
    replaced, found = containment(batch_of(score=math.nan))
    assert replaced["score"].tolist() == [1.0, 0, 0, 1, 0.5, 0]
    assert found == {BAD: "score"}


def test_what_is_masked_counts_for_nothing() -> None:
    batch = batch_of()
    rewards = torch.where(trained_mask(batch), 0.0, math.nan)
    assert containment(batch.with_columns(notes=batch.jagged(rewards), reasons=["x"] * 6)) == ({}, {})


def test_where_no_sample_is_left_the_step_is_skipped() -> None:
    """Masking all of them would train on nothing, and no count of skipped steps would end the run."""
    batch = batch_of()
    nan = batch.with_columns(score=torch.full((6,), math.nan))
    replaced, found = containment(nan)
    assert replaced == {}
    assert len(found) == 6
    assert "all others of its batch: none can be left out" in described(nan, found)


def test_it_is_not_computed_in_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives NaN for a sample has NaN gradients even if all of the sample is masked."""
    changed, *_ = contained_advantages(batch_of(values=math.nan), AlgorithmSettings(), None, 10)
    batch = batch_of().with_columns(**{name: changed[name] for name in changed.names}, row=torch.arange(6))
    monkeypatch.setattr(policy_losses, "_entries", dict(policy_losses._entries))
    policy_losses.register("rows", required_columns={"row"})(lambda inputs, params: None)
    policy_losses.register("groups", required_columns={"row"}, together="group")(lambda inputs, params: None)

    def rows(size: int, loss: str) -> list[list[int]]:
        return [part["row"].tolist() for part in mini_batches(batch, size, policy_losses.get(loss))]

    assert rows(3, "rows") == [[0, 1, 2], [3, 5]]
    assert rows(1, "rows") == [[0], [1], [2], [3], [4], [5]], "a mini-batch is never empty"
    assert rows(3, "groups") == [[0, 1, 2], [3, 4, 5]], "a unit stays whole"
    assert [len(part) for part in mini_batches(batch, 6)] == [5]
    assert [len(part) for part in mini_batches(batch_of(), 3)] == [3, 3]


def test_advantages_of_an_estimator_are_contained_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advantages, "_entries", dict(advantages._entries))

    @advantages.register("divides")
    def divides(batch: Batch, params: Any) -> Any:
        found = advantages.get("grpo").function(batch, advantages.get("grpo").params())
        odd = torch.arange(6).repeat_interleave(batch.lengths) == BAD
        found.advantages[odd & trained_mask(batch)] = math.nan
        return found

    changed, metrics, _, message = contained_advantages(batch_of(), AlgorithmSettings(advantage="divides"), None, 10)
    assert metrics.to_dict()[NON_FINITE] == 1
    assert "advantages" in message
    assert bool(torch.isfinite(changed.flat("advantages")).all())
    assert sequence_sums(changed.flat("loss_mask"), LENGTHS)[BAD] == 0
