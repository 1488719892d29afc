"""Mini-batches, epochs, and samples that are left out without changing the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlcore.algorithms import advantages, policy_losses
from rlcore.algorithms.objectives import PolicyObjective, PolicyObjectiveSettings, SFTObjective, SFTObjectiveSettings
from rlcore.batch import Batch, Jagged
from rlcore.engines import Objective
from rlcore.metrics import Metrics
from rlcore_recipes.settings import ActorSettings
from rlcore_recipes.step.update import (
    CountingLeftOut,
    kept_parts,
    train_epochs,
    training_columns,
    without_zero_advantage,
)

LENGTHS = [5, 3, 6, 2, 4, 7]


def batch_of(advantages: list[float], seed: int = 0) -> Batch:
    """Sequences of `LENGTHS` with one advantage each, two prompt tokens, fp64."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    total = int(lengths.sum())
    mask = Jagged.from_list([[0.0] * 2 + [1.0] * (length - 2) for length in LENGTHS], torch.float64)
    per_token = torch.tensor(advantages, dtype=torch.float64).repeat_interleave(lengths)
    return Batch(
        {
            "tokens": Jagged(torch.randint(0, 11, (total,), generator=random), lengths),
            "loss_mask": mask,
            "advantages": Jagged(per_token * mask.values, lengths),
            "old_logprobs": Jagged(-torch.rand(total, generator=random, dtype=torch.float64), lengths),
        }
    )


def loss_and_gradient(batch: Batch, objective: Objective) -> tuple[float, torch.Tensor]:
    weights = torch.linspace(-1, 0.2, 11, dtype=torch.float64, requires_grad=True)
    outputs = {
        "logprobs": weights[batch.flat("tokens")],
        "entropy": weights.square()[batch.flat("tokens")],
    }
    loss, _ = objective.loss(outputs, batch, objective.denominators(batch))
    loss.backward()
    assert weights.grad is not None
    return float(loss.detach()), weights.grad


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize(
    "policy_loss", [entry.name for entry in policy_losses if "vanishes_with_advantage" in entry.traits]
)
def test_loss_and_gradient_do_not_change(policy_loss: str, aggregation: str) -> None:
    settings = PolicyObjectiveSettings(policy_loss=policy_loss, aggregation=aggregation)
    objective = PolicyObjective(settings)
    batch = batch_of([0.5, 0.0, -1.2, 0.0, 0.0, 2.0])
    kept, counting = without_zero_advantage(batch, objective, keep=1)
    assert len(kept) == 3
    before, after = loss_and_gradient(batch, objective), loss_and_gradient(kept, counting)
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=1e-12, atol=1e-15)
    assert float(before[1].abs().max()) > 0


def test_every_built_in_loss_vanishes_with_the_advantage() -> None:
    """Otherwise the loop above would test fewer of them, and runs would compute samples for nothing."""
    assert all("vanishes_with_advantage" in entry.traits for entry in policy_losses)


@pytest.mark.parametrize(
    ("settings", "drops"),
    [
        ({}, True),
        ({"objective": {"policy_loss": "reinforce", "aggregation": "seq-mean-token-mean"}}, True),
        ({"objective": {"kl_loss": {"coeff": 0.1}}}, False),
        ({"objective": {"entropy_coeff": -0.1}}, False),
        ({"objective": {"policy_loss": "of another package"}}, False),
        ({"objective": {"policy_loss": "of pairs"}}, False),
        ({"drop_zero_advantage": False}, False),
    ],
)
def test_samples_are_left_out_by_default_wherever_that_is_exact(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], drops: bool
) -> None:
    monkeypatch.setattr(policy_losses, "_entries", dict(policy_losses._entries))
    policy_losses.register("of another package")(lambda inputs, params: (inputs.logprobs, Metrics()))
    policy_losses.register("of pairs", traits={"vanishes_with_advantage"}, together="pair")(lambda inputs, params: ...)
    actor = ActorSettings(**settings)
    assert actor.drops_zero_advantage == drops
    assert bool(actor.trains_without_advantage) == (not drops and "objective" in settings)
    if actor.trains_without_advantage:
        with pytest.raises(ValidationError, match="leaves samples out that objective"):
            ActorSettings(**settings, drop_zero_advantage=True)


def test_logged_losses_are_those_of_all_samples() -> None:
    """Over two mini-batches, one without any advantage, each divided into micro-batches."""
    objective = PolicyObjective(PolicyObjectiveSettings())
    batches = [batch_of([0.5, 0.0, -1.2, 0.0, 0.0, 2.0], seed=1), batch_of([0.0] * 6, seed=2)]
    plain = [(batch, objective) for batch in batches]
    logged = []
    for parts in (plain, [without_zero_advantage(batch, objective, keep=1) for batch in batches]):
        measured = []
        for batch, wanted in parts:
            sums = wanted.denominators(batch)
            for micro in batch.split(2):
                logprobs = torch.linspace(-1, 0.2, 11, dtype=torch.float64)[micro.flat("tokens")]
                measured.append(wanted.loss({"logprobs": logprobs, "entropy": -logprobs}, micro, sums)[1])
        logged.append(Metrics.merge(measured).to_dict())
    for name in ("loss", "pg_loss"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-12) != 0


def test_a_sample_whose_advantage_is_not_a_number_is_not_left_out() -> None:
    batch = batch_of([0.5, 0.0, float("nan"), 0.0, 0.0, 2.0])
    kept, _ = without_zero_advantage(batch, PolicyObjective(PolicyObjectiveSettings()), keep=1)
    assert len(kept) == 3


def test_denominators_add_up_however_the_samples_are_divided() -> None:
    objective = PolicyObjective(PolicyObjectiveSettings())
    batch = batch_of([0.5, 0.0, -1.2, 0.0, 1.0, 2.0])
    kept, counting = without_zero_advantage(batch, objective, keep=1)
    halves = [counting.denominators(part) for part in kept.split(2)]
    assert {name: sum(half[name] for half in halves) for name in halves[0]} == objective.denominators(batch)


def test_some_samples_stay_when_no_advantage_is_left() -> None:
    batch = batch_of([0.0] * 6)
    kept, counting = without_zero_advantage(batch, PolicyObjective(PolicyObjectiveSettings()), keep=2)
    assert len(kept) == 2
    loss, gradient = loss_and_gradient(kept, counting)
    assert loss == 0
    assert float(gradient.abs().max()) == 0


def test_an_objective_that_counts_is_data() -> None:
    import pickle

    objective = CountingLeftOut(PolicyObjective(PolicyObjectiveSettings()))
    assert pickle.loads(pickle.dumps(objective)) == objective


class Recorder:
    """Remembers the mini-batches it is trained on."""

    def __init__(self) -> None:
        self.trained: list[tuple[Batch, Any]] = []

    def train(self, batch: Batch, objective: Objective) -> Metrics:
        self.trained.append((batch, objective))
        metrics = Metrics()
        metrics.mean("loss", float(len(self.trained)), 1.0)
        return metrics


def test_epochs_go_over_the_mini_batches_in_order() -> None:
    engine, parts = Recorder(), [(batch_of([1.0] * 6, seed), None) for seed in range(3)]
    metrics = train_epochs(engine, parts, epochs=2)  # type: ignore[arg-type]
    assert [batch for batch, _ in engine.trained] == [batch for batch, _ in parts] * 2
    assert metrics.to_dict() == {"loss": 3.5}


def test_texts_stay_with_the_controller() -> None:
    batch = batch_of([1.0] * 6).with_columns(completion=["text"] * 6, score=torch.zeros(6))
    assert training_columns(batch).names == ("tokens", "loss_mask", "advantages", "old_logprobs")


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_imitation_is_sft_on_what_is_kept(aggregation: str) -> None:
    """Loss and gradient; with weights each sample's part of them is multiplied."""
    chosen = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    batch = batch_of([0.0] * 6).with_columns(sample_weight=chosen)
    batch = batch.with_columns(token_rewards=batch["advantages"])
    entry = advantages.get("sample_weight")
    imitation = PolicyObjective(PolicyObjectiveSettings(policy_loss="reinforce", aggregation=aggregation))
    sft = SFTObjective(SFTObjectiveSettings(aggregation=aggregation))

    def imitated(batch: Batch) -> tuple[float, torch.Tensor]:
        (kept,) = kept_parts(batch, 1)
        found = entry.function(kept, entry.params()).advantages
        return loss_and_gradient(kept.with_columns(advantages=kept.jagged(found)), imitation)

    loss, gradient = imitated(batch)
    expected, expected_gradient = loss_and_gradient(batch.take([0, 2, 5]), sft)
    assert loss == pytest.approx(expected)
    assert torch.allclose(gradient, expected_gradient)
    weighted, _ = imitated(batch.with_columns(sample_weight=2 * chosen))
    assert weighted == pytest.approx(2 * expected)


@pytest.mark.parametrize(("kept", "sizes"), [(6, [1, 2, 1, 2]), (4, [1, 1, 1, 1]), (3, [1, 1, 1]), (0, [])])
def test_kept_samples_are_divided_evenly(kept: int, sizes: list[int]) -> None:
    batch = batch_of([0.0] * 6).with_columns(sample_weight=torch.tensor([1.0] * kept + [0.0] * (6 - kept)))
    parts = kept_parts(batch, 4)
    assert [len(part) for part in parts] == sizes
    assert sum(part.total_tokens for part in parts) == sum(LENGTHS[:kept])
