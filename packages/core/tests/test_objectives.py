"""Objectives: the same loss and gradient however a mini-batch is divided, untouched by whatever is masked."""

from __future__ import annotations

import math
import pickle
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore.algorithms import PolicyLossInputs, aggregations, corrections, policy_losses
from rlcore.algorithms.objectives import (
    PolicyObjective,
    PolicyObjectiveSettings,
    SFTObjective,
    SFTObjectiveSettings,
    ValueObjective,
    ValueObjectiveSettings,
)
from rlcore.algorithms.sequences import trained_mask
from rlcore.batch import Batch, Jagged
from rlcore.config.registry import NoParams
from rlcore.engines.train import Objective
from rlcore.errors import BatchError
from rlcore.metrics import Metrics

COLUMNS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "returns")
OUTPUTS = ("logprobs", "entropy", "values")


def mini_batch(seed: int, samples: int = 9) -> tuple[Batch, dict[str, torch.Tensor]]:
    """Ragged samples, some empty or without a trained token, and what a model would have computed for them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 8, (samples,), generator=generator)
    total = int(lengths.sum())
    mask = (torch.rand(total, generator=generator) < 0.6).long()
    columns = {
        name: Jagged(torch.randn(total, generator=generator, dtype=torch.float64) * 0.5, lengths) for name in COLUMNS
    }
    outputs = {name: torch.randn(total, generator=generator, dtype=torch.float64) * 0.5 for name in OUTPUTS}
    return Batch({"loss_mask": Jagged(mask, lengths), **columns}), outputs


def policy(**kwargs: Any) -> PolicyObjective:
    return PolicyObjective(PolicyObjectiveSettings(**kwargs))


def aggregation(name: str) -> dict[str, Any]:
    return {"name": name, **({"max_length": 9} if name.endswith("norm") else {})}


def evaluate(
    objective: Objective, batch: Batch, outputs: dict[str, torch.Tensor], sums: dict[str, float]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Metrics]:
    """Loss, gradient with respect to each requested output, metrics."""
    leaves = {name: outputs[name].clone().requires_grad_() for name in objective.request.outputs}
    loss, metrics = objective.loss(leaves, batch, sums)
    loss.backward()
    zero = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return loss.detach(), {n: zero[n] if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}, metrics


FULL = {"entropy_coeff": 0.01, "kl_loss": {"coeff": 0.1, "estimator": "k3"}}
OBJECTIVES: dict[str, Objective] = {
    **{
        f"{loss.name}/{how.name}": policy(policy_loss=loss.name, aggregation=aggregation(how.name), **FULL)
        for loss in policy_losses
        for how in aggregations
    },
    **{f"ppo/{entry.name}": policy(correction=entry.name) for entry in corrections},
    "ppo/tis sequence": policy(correction={"name": "tis", "level": "sequence"}),
    **{
        f"value/{how.name}": ValueObjective(ValueObjectiveSettings(aggregation=aggregation(how.name), coeff=0.5))
        for how in aggregations
    },
    **{
        f"sft/{how.name}": SFTObjective(SFTObjectiveSettings(aggregation=aggregation(how.name))) for how in aggregations
    },
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), ranks=st.integers(1, 3), micro_batches=st.integers(1, 4))
def test_loss_does_not_depend_on_how_the_mini_batch_is_divided(
    objective: Objective, seed: int, ranks: int, micro_batches: int
) -> None:
    batch, outputs = mini_batch(seed)
    whole_loss, whole_gradients, whole_metrics = evaluate(objective, batch, outputs, objective.denominators(batch))

    rng = random.Random(seed)
    order = list(range(len(batch)))
    rng.shuffle(order)
    parts: list[list[list[int]]] = [[[] for _ in range(micro_batches)] for _ in range(ranks)]
    for index in order:  # ranks and micro-batches may stay empty
        rng.choice(rng.choice(parts)).append(index)
    columns = batch.with_columns(**{f"out_{name}": batch.jagged(value) for name, value in outputs.items()})
    per_rank = [objective.denominators(batch.take([i for part in rank for i in part])) for rank in parts]
    sums = {name: sum(part[name] for part in per_rank) for name in per_rank[0]}

    loss = torch.zeros((), dtype=torch.float64)
    pieces: dict[str, dict[int, torch.Tensor]] = {name: {} for name in whole_gradients}
    measured = []
    for part in (part for rank in parts for part in rank):
        micro = columns.take(part)
        share, gradients, metrics = evaluate(
            objective, micro, {name: micro.flat(f"out_{name}") for name in outputs}, sums
        )
        loss += share
        measured.append(metrics)
        for name, gradient in gradients.items():
            pieces[name].update(zip(part, gradient.split(micro.lengths.tolist())))

    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=1e-12)
    for name, expected in whole_gradients.items():
        joined = torch.cat([pieces[name][i] for i in range(len(batch))])
        torch.testing.assert_close(joined, expected, rtol=1e-12, atol=1e-12)
    assert Metrics.merge(measured).to_dict() == pytest.approx(whole_metrics.to_dict(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_values_are_never_read(objective: Objective, garbage: float) -> None:
    batch, outputs = mini_batch(4)
    trained = batch.flat("loss_mask").bool()
    trained[batch.lengths.cumsum(0)[:-1][batch.lengths[1:] > 0]] = False
    trained[0] = False
    dirty = batch.with_columns(
        **{name: batch.jagged(batch.flat(name).masked_fill(~trained, garbage)) for name in COLUMNS}
    )
    dirty_outputs = {name: value.masked_fill(~trained, garbage) for name, value in outputs.items()}
    sums = objective.denominators(batch)
    loss, gradients, metrics = evaluate(objective, batch, outputs, sums)
    dirty_loss, dirty_gradients, dirty_metrics = evaluate(objective, dirty, dirty_outputs, sums)
    assert loss.isfinite()
    assert torch.equal(dirty_loss, loss)
    for name, gradient in gradients.items():
        assert torch.equal(dirty_gradients[name], gradient)
        assert gradient[~trained].abs().sum() == 0
    assert dirty_metrics.to_dict() == metrics.to_dict()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("lengths", [[], [0], [1, 3]])
def test_micro_batch_without_trained_tokens(objective: Objective, lengths: list[int]) -> None:
    """Zero loss, but still a graph: every rank must run backward."""
    size = torch.tensor(lengths, dtype=torch.int64)
    zeros = Jagged(torch.zeros(sum(lengths)), size)
    batch = Batch(dict.fromkeys(("loss_mask", *COLUMNS), zeros))
    outputs = {name: torch.zeros(sum(lengths), requires_grad=True) for name in objective.request.outputs}
    for sums in ({"tokens": 7.0, "sequences": 2.0}, objective.denominators(batch)):
        loss, metrics = objective.loss(outputs, batch, sums)
        assert loss.requires_grad
        loss.backward()
        assert float(loss.detach()) == 0
        assert not [name for name, value in metrics.to_dict().items() if not math.isfinite(value)]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives_travel_to_workers(objective: Objective) -> None:
    batch, outputs = mini_batch(1)
    copy = pickle.loads(pickle.dumps(objective))
    sums = objective.denominators(batch)
    assert copy.request == objective.request
    assert torch.equal(evaluate(copy, batch, outputs, sums)[0], evaluate(objective, batch, outputs, sums)[0])


def test_policy_objective_by_hand() -> None:
    """All terms of the loss, token by token."""
    batch, outputs = mini_batch(2)
    objective = policy(
        policy_loss={"name": "ppo", "clip_low": 0.1, "clip_high": 0.3},
        correction={"name": "tis", "cap": 1.2},
        entropy_coeff=0.02,
        kl_loss={"coeff": 0.3, "estimator": "k2"},
    )
    joined = batch.with_columns(**{f"out_{name}": batch.jagged(value) for name, value in outputs.items()})
    terms: dict[str, list[float]] = {"pg_loss": [], "entropy": [], "kl_loss": []}
    for row in joined.rows():
        for t in range(1, len(row["loss_mask"])):
            if not row["loss_mask"][t]:
                continue
            x, old, ref, rollout, a, entropy = (
                float(row[name][t])
                for name in (
                    "out_logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages", "out_entropy",
                )
            )  # fmt: skip
            ratio = math.exp(x - old)
            loss = max(-a * ratio, -a * min(max(ratio, 0.9), 1.3))
            loss = min(loss, -3 * a) if a < 0 else loss
            terms["pg_loss"].append(loss * min(math.exp(old - rollout), 1.2))
            terms["entropy"].append(entropy)
            terms["kl_loss"].append((x - ref) ** 2 / 2)
    expected = {name: sum(values) / len(values) for name, values in terms.items()}
    expected["loss"] = expected["pg_loss"] - 0.02 * expected["entropy"] + 0.3 * expected["kl_loss"]
    loss, _, metrics = evaluate(objective, batch, outputs, objective.denominators(batch))
    measured = metrics.to_dict()
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-12)


def test_value_and_sft_objectives_by_hand() -> None:
    batch, outputs = mini_batch(3)
    joined = batch.with_columns(**{f"out_{name}": batch.jagged(value) for name, value in outputs.items()})
    squares, nll = [], []
    for row in joined.rows():
        for t in range(1, len(row["loss_mask"])):
            if row["loss_mask"][t]:
                v, old, target = (float(row[name][t]) for name in ("out_values", "values", "returns"))
                near = min(max(v, old - 0.5), old + 0.5)
                squares.append(max((v - target) ** 2, (near - target) ** 2) / 2)
                nll.append(-float(row["out_logprobs"][t]))
    value = ValueObjective(ValueObjectiveSettings(coeff=0.25))
    loss, _, metrics = evaluate(value, batch, outputs, value.denominators(batch))
    assert metrics.to_dict()["vf_loss"] == pytest.approx(sum(squares) / len(squares), rel=1e-12)
    assert float(loss) == pytest.approx(0.25 * sum(squares) / len(squares), rel=1e-12)
    sft = SFTObjective()
    loss, _, metrics = evaluate(sft, batch, outputs, sft.denominators(batch))
    assert float(loss) == metrics.to_dict()["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-12)


def test_without_old_logprobs_the_update_is_on_policy() -> None:
    batch, outputs = mini_batch(5)
    on_policy = batch.with_columns(old_logprobs=batch.jagged(outputs["logprobs"]))
    objective = policy()
    sums = objective.denominators(batch)
    _, gradients, metrics = evaluate(objective, batch.drop("old_logprobs"), outputs, sums)
    _, expected, _ = evaluate(objective, on_policy, outputs, sums)
    assert torch.equal(gradients["logprobs"], expected["logprobs"])
    assert metrics.to_dict()["ppo_kl"] == 0


def test_entropy_is_measured_but_trained_only_with_a_coefficient() -> None:
    batch, outputs = mini_batch(6)
    for coeff in (0.0, 0.1):
        objective = policy(entropy_coeff=coeff)
        assert objective.request.outputs == ("logprobs", "entropy")
        _, gradients, metrics = evaluate(objective, batch, outputs, objective.denominators(batch))
        assert "entropy" in metrics
        assert bool(gradients["entropy"].any()) == bool(coeff)


@pytest.mark.parametrize(
    ("column", "kwargs"),
    [
        ("advantages", {}),
        ("ref_logprobs", {"kl_loss": {"coeff": 0.1}}),
        ("rollout_logprobs", {"correction": "tis"}),
    ],
)
def test_missing_column_is_named(column: str, kwargs: dict[str, Any]) -> None:
    batch, outputs = mini_batch(7)
    objective = policy(**kwargs)
    with pytest.raises(BatchError, match=f"no column '{column}'"):
        evaluate(objective, batch.drop(column), outputs, objective.denominators(batch))


def test_mismatch_is_measured_wherever_the_rollout_says_its_logprobs() -> None:
    batch, outputs = mini_batch(8)
    objective = policy()
    sums = objective.denominators(batch)
    assert "rollout_kl" in evaluate(objective, batch, outputs, sums)[2]
    assert "rollout_kl" not in evaluate(objective, batch.drop("rollout_logprobs"), outputs, sums)[2]


@pytest.mark.parametrize("old", ["missing", "of the rollout"])
def test_mismatch_is_that_of_the_trainer_where_old_logprobs_are_not_its_own(old: str) -> None:
    batch, outputs = mini_batch(8)
    objective = PolicyObjective(PolicyObjectiveSettings(), old_from_rollout=old == "of the rollout")
    sums = objective.denominators(batch)
    recomputed = batch.with_columns(old_logprobs=batch.jagged(outputs["logprobs"]))
    expected = evaluate(policy(), recomputed, outputs, sums)[2].to_dict()
    other = batch.drop("old_logprobs")
    if old == "of the rollout":
        other = batch.with_columns(old_logprobs=batch["rollout_logprobs"])
    measured = evaluate(objective, other, outputs, sums)[2].to_dict()
    names = {name for name in expected if name.startswith("rollout_")}
    assert {"rollout_kl", "rollout_kl_k3", "rollout_ratio_max", "rollout_log_ratio_p999", "rollout_clipfrac"} <= names
    assert {name: measured[name] for name in names} == {name: expected[name] for name in names}
    assert measured["rollout_kl"] != 0


@pytest.mark.parametrize("correction", [entry.name for entry in corrections])
def test_correction_weighs_by_the_current_policy_where_old_logprobs_are_the_rollouts(correction: str) -> None:
    """Weights made of the rollout's log-probs alone would be 1 on every token, as if there were no correction."""
    batch, outputs = mini_batch(8)
    settings = PolicyObjectiveSettings(policy_loss="reinforce", correction=correction)
    taken = batch.with_columns(old_logprobs=batch["rollout_logprobs"])
    sums = policy().denominators(batch)
    loss, gradients, metrics = evaluate(PolicyObjective(settings, old_from_rollout=True), taken, outputs, sums)
    expected, wanted, _ = evaluate(PolicyObjective(settings), batch.drop("old_logprobs"), outputs, sums)
    assert torch.equal(loss, expected)
    assert torch.equal(gradients["logprobs"], wanted["logprobs"])
    assert metrics.to_dict()["correction_weight"] != 1


def test_a_policy_loss_gets_the_columns_that_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_losses, "_entries", dict(policy_losses._entries))
    needs = {"entropy", "ref_logprobs", "tokens", "states", "difficulty", "hint"}
    seen: dict[str, Any] = {}

    @policy_losses.register("declares", required_columns=needs, together="pair")
    def declares(inputs: PolicyLossInputs, params: NoParams) -> tuple[torch.Tensor, Metrics]:
        seen.update(inputs.columns)
        return inputs.logprobs * inputs.columns["entropy"], Metrics()

    batch, outputs = mini_batch(3)
    total, samples = batch.total_tokens, len(batch)
    states = torch.full((total, 2), math.nan)
    mask = trained_mask(batch)
    states[mask] = 1.0
    batch = batch.with_columns(
        tokens=batch.jagged(torch.arange(total)),
        states=batch.jagged(states),
        difficulty=torch.rand(samples, 3),
        hint=[{"row": row} for row in range(samples)],
        pair=torch.arange(samples) // 2,
    )
    objective = policy(policy_loss="declares")
    assert objective.request.together == "pair"
    sums = objective.denominators(batch)
    _, gradients, _ = evaluate(objective, batch, outputs, sums)
    assert seen.keys() == needs | {"pair"}
    assert torch.equal(seen["states"], torch.where(mask[:, None], 1.0, 0.0).expand(-1, 2))
    assert torch.equal(seen["ref_logprobs"], torch.where(mask, batch.flat("ref_logprobs"), 0))
    assert torch.equal(seen["tokens"], batch.flat("tokens"))
    assert torch.equal(seen["difficulty"], batch["difficulty"])
    assert seen["hint"] == batch["hint"]
    assert bool((gradients["entropy"][mask] != 0).all()), "the entropy has a gradient"
    with pytest.raises(BatchError, match="policy loss 'declares' needs the column 'hint', which is not in the batch"):
        evaluate(objective, batch.drop("hint"), outputs, sums)


def test_mini_batches_merge_to_the_mean_of_their_losses() -> None:
    losses, parts = [], []
    for seed in (1, 2):
        batch, outputs = mini_batch(seed)
        objective = policy()
        sums = objective.denominators(batch)
        loss, _, metrics = evaluate(objective, batch, outputs, sums)
        losses.append((float(loss), sums["tokens"]))
        parts.append(metrics)
    expected = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    assert Metrics.merge(parts).to_dict()["loss"] == pytest.approx(expected, rel=1e-12)


def test_settings_round_trip_through_their_dump() -> None:
    settings = PolicyObjectiveSettings(
        policy_loss={"name": "ppo", "dual_clip": None}, correction={"name": "icepop", "high": 2.0}, **FULL
    )
    assert PolicyObjectiveSettings.model_validate(settings.model_dump(mode="json")) == settings
