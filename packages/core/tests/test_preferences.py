"""Preference losses: values of independent formulas, and the same gradient however pairs are distributed."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlcore.algorithms import preference_losses
from rlcore.algorithms.preferences import PreferenceObjective, PreferenceObjectiveSettings, answer_logprobs
from rlcore.batch import Batch, Jagged
from rlcore.errors import BatchError
from rlcore.metrics import Metrics

PAIRED = [entry.name for entry in preference_losses if entry.together is not None]
EVERY = [entry.name for entry in preference_losses]


def objective(loss: Any = "dpo", **settings: Any) -> PreferenceObjective:
    return PreferenceObjective(PreferenceObjectiveSettings(loss=loss, **settings))


def answers(seed: int, pairs: int = 6, scale: float = 1.0) -> tuple[Batch, torch.Tensor]:
    """Pairs whose sides have different lengths, in no order, and the policy's log-probs ``[T]``."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (2 * pairs,), generator=generator)
    total = int(lengths.sum())
    mask = (torch.rand(total, generator=generator) < 0.7).float()
    mask[lengths.cumsum(0) - 1] = 1  # every answer has a token
    order = torch.randperm(2 * pairs, generator=generator)
    logprobs = -torch.rand(total, generator=generator) * scale - 1e-3
    batch = Batch(
        {
            "tokens": Jagged(torch.ones(total, dtype=torch.int64), lengths),
            "loss_mask": Jagged(mask, lengths),
            "ref_logprobs": Jagged(-torch.rand(total, generator=generator) * scale - 1e-3, lengths),
            "logprobs": Jagged(logprobs, lengths),
            "pair": (torch.randperm(5 * pairs, generator=generator)[:pairs]).repeat_interleave(2),
            "side": torch.tensor([0, 1]).repeat(pairs),
            "margin": torch.full((2 * pairs,), 0.7),
            "kl_log_ratio": torch.randn(2 * pairs, generator=generator, dtype=torch.float64) + 0.5,
        }
    ).take(order)
    batch = batch.with_columns(ref_answer_logprob=answer_logprobs(batch, batch.flat("ref_logprobs")))
    return batch, batch.flat("logprobs")


def evaluate(
    found: PreferenceObjective, batch: Batch, logprobs: torch.Tensor, sums: dict[str, float] | None = None
) -> tuple[float, torch.Tensor, Metrics]:
    """Loss, its gradient with respect to log-probs, metrics."""
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = found.loss({"logprobs": leaf}, batch, found.denominators(batch) if sums is None else sums)
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad, metrics


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean: float) -> float:
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


# Of one pair: log-probs of both answers under policy (p) and reference (q), their numbers of tokens (n), β.
ORACLES: dict[str, Callable[..., float]] = {
    "dpo": lambda pc, pr, qc, qr, nc, nr, b: -math.log(sigma(b * ((pc - pr) - (qc - qr)))),
    "robust-dpo": lambda pc, pr, qc, qr, nc, nr, b: -math.log(sigma(b * ((pc - pr) - (qc - qr)))),
    "ln-dpo": lambda pc, pr, qc, qr, nc, nr, b: -math.log(sigma(b * ((pc - qc) / nc - (pr - qr) / nr))),
    "odpo": lambda pc, pr, qc, qr, nc, nr, b: -math.log(sigma(b * ((pc - pr) - (qc - qr)) - 0.7)),
    "ipo": lambda pc, pr, qc, qr, nc, nr, b: ((pc - qc) / nc - (pr - qr) / nr - 1 / (2 * b)) ** 2,
    "hinge": lambda pc, pr, qc, qr, nc, nr, b: max(0.0, 1 - b * (pc - pr - qc + qr)),
    "exo": lambda pc, pr, qc, qr, nc, nr, b: sum(
        p * math.log(p / q)
        for p, q in zip((sigma(b * (pc - pr - qc + qr)), sigma(-b * (pc - pr - qc + qr))), (0.999, 0.001))
    ),
    "nca": lambda pc, pr, qc, qr, nc, nr, b: (
        -math.log(sigma(b * (pc - qc))) - (math.log(sigma(-b * (pc - qc))) + math.log(sigma(-b * (pr - qr)))) / 2
    ),
    "sppo": lambda pc, pr, qc, qr, nc, nr, b: (pc - qc - 1 / (2 * b)) ** 2 + (pr - qr + 1 / (2 * b)) ** 2,
    "apo-zero": lambda pc, pr, qc, qr, nc, nr, b: 1 - sigma(b * (pc - qc)) + sigma(b * (pr - qr)),
    "apo-down": lambda pc, pr, qc, qr, nc, nr, b: sigma(b * (pc - qc)) + 1 - sigma(b * (pc - qc - pr + qr)),
    "dpop": lambda pc, pr, qc, qr, nc, nr, b: -math.log(sigma(b * (pc - pr - qc + qr - 50 * max(0.0, qc - pc)))),
    "orpo": lambda pc, pr, qc, qr, nc, nr, b: -pc / nc - b * math.log(sigma(log_odds(pc / nc) - log_odds(pr / nr))),
    "simpo": lambda pc, pr, qc, qr, nc, nr, b: -math.log(sigma(b * (pc / nc - pr / nr) - 1)),
    "cpo": lambda pc, pr, qc, qr, nc, nr, b: -math.log(sigma(b * (pc - pr))) - pc / nc,
    "slic": lambda pc, pr, qc, qr, nc, nr, b: max(0.0, 1 - pc + pr) - pc / nc,
    "kto": lambda pc, pr, qc, qr, nc, nr, b, z: (1 - sigma(b * (pc - qc - z)) + 1 - sigma(b * (z - pr + qr))) / 2,
    "apo-zero-unpaired": lambda pc, pr, qc, qr, nc, nr, b: (1 - sigma(b * (pc - qc)) + sigma(b * (pr - qr))) / 2,
}


def sides(batch: Batch) -> list[tuple[float, float, float, float, float, float]]:
    """The numbers of `ORACLES` of each pair, summed by hand."""
    found: dict[int, dict[int, tuple[float, float, int]]] = {}
    for row in batch.rows():
        trained = [place for place in range(1, len(row["tokens"])) if row["loss_mask"][place]]
        policy, reference = (sum(float(row[name][place]) for place in trained) for name in ("logprobs", "ref_logprobs"))
        found.setdefault(int(row["pair"]), {})[int(row["side"])] = policy, reference, len(trained)
    return [(c[0], r[0], c[1], r[1], c[2], r[2]) for c, r in ((pair[0], pair[1]) for pair in found.values())]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_that_of_the_papers_formula(name: str, seed: int) -> None:
    batch, logprobs = answers(seed)
    beta = preference_losses.get(name).params().model_dump().get("beta", 0.0)
    z = [max(0.0, float(batch["kl_log_ratio"].mean()))] if name == "kto" else []
    expected = [ORACLES[name](*side, beta, *z) for side in sides(batch)]
    found, gradient, metrics = evaluate(objective(name), batch, logprobs)
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert metrics.to_dict()["loss"] == pytest.approx(found, rel=1e-6)
    assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_does_not_depend_on_ranks_and_micro_batches(name: str, seed: int) -> None:
    """Two ranks of unequal size, each with several micro-batches that hold whole pairs."""
    batch, logprobs = answers(seed, pairs=8)
    whole = objective(name, sft_coeff=0.3)
    loss, gradient, metrics = evaluate(whole, batch, logprobs)
    pairs = sorted({*batch["pair"].tolist()})
    random.Random(seed).shuffle(pairs)
    parts = [pairs[:1], pairs[1:3], pairs[3:], []]
    rows = [[row for row, pair in enumerate(batch["pair"].tolist()) if pair in part] for part in parts]
    ranks = [whole.denominators(batch.take(rows[0] + rows[1])), whole.denominators(batch.take(rows[2] + rows[3]))]
    sums = {key: sum(rank[key] for rank in ranks) for key in ranks[0]}
    shares, measured = [], []
    pieces: dict[int, torch.Tensor] = {}
    for part in rows:
        micro = batch.take(part)
        share, piece, numbers = evaluate(whole, micro, micro.flat("logprobs"), sums)
        shares.append(share)
        measured.append(numbers)
        pieces.update(zip(part, torch.split(piece, micro.lengths.tolist())))
    assert sum(shares) == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(torch.cat([pieces[row] for row in range(len(batch))]), gradient, rtol=1e-5, atol=1e-7)
    assert Metrics.merge(measured).to_dict() == pytest.approx(metrics.to_dict(), rel=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_masked_numbers_are_never_read(name: str) -> None:
    batch, logprobs = answers(0)
    loss, gradient, _ = evaluate(objective(name), batch, logprobs)
    trained = batch.flat("loss_mask").bool()
    dirty, dirty_gradient, _ = evaluate(objective(name), batch, logprobs.masked_fill(~trained, math.nan))
    assert dirty == loss
    assert torch.equal(dirty_gradient, gradient)
    assert bool((gradient[~trained] == 0).all())


AT_REFERENCE = {"dpo": math.log(2), "robust-dpo": math.log(2), "ln-dpo": math.log(2), "ipo": 25.0, "hinge": 1.0}
AT_REFERENCE |= {"apo-zero": 1.0, "apo-down": 1.0, "dpop": math.log(2), "kto": 0.5, "nca": 2 * math.log(2)}


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_at_the_reference_the_loss_is_known_whatever_the_lengths(name: str) -> None:
    batch, _ = answers(1)
    batch = batch.with_columns(kl_log_ratio=torch.zeros(len(batch), dtype=torch.float64))
    loss = {"name": name, **({"beta": 0.1} if name == "ipo" else {})}
    _, _, metrics = evaluate(objective(loss), batch, batch.flat("ref_logprobs"))
    found = metrics.to_dict()
    assert found["loss"] == pytest.approx(AT_REFERENCE[name], rel=1e-12)
    assert found["rewards/chosen"] == found["rewards/rejected"] == 0.0


@pytest.mark.parametrize(("name", "averages"), [("dpo", False), ("ipo", True), ("simpo", True), ("ln-dpo", True)])
def test_which_losses_average_over_tokens(name: str, averages: bool) -> None:
    """Answers of twice the length, each token with the same log-ratio."""

    def loss(length: int) -> float:
        lengths = torch.tensor([length + 1, length + 1])
        mask = torch.ones(2 * length + 2)
        batch = Batch(
            {
                "loss_mask": Jagged(mask, lengths),
                "pair": torch.zeros(2, dtype=torch.int64),
                "side": torch.tensor([0, 1]),
                "ref_answer_logprob": torch.tensor([-1.0, -1.0], dtype=torch.float64) * length,
            }
        )
        return evaluate(objective(name), batch, torch.cat([mask[: length + 1] * -0.7, mask[: length + 1] * -1.2]))[0]

    assert (loss(8) == pytest.approx(loss(4), rel=1e-6)) == averages


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_robust_dpo_is_dpo_in_expectation_over_swapped_labels(smoothing: float) -> None:
    batch, logprobs = answers(2)
    swapped = batch.with_columns(side=1 - batch["side"])
    robust = objective({"name": "robust-dpo", "label_smoothing": smoothing})
    found = (1 - smoothing) * evaluate(robust, batch, logprobs)[0] + smoothing * evaluate(robust, swapped, logprobs)[0]
    assert found == pytest.approx(evaluate(objective("dpo"), batch, logprobs)[0], rel=1e-6)


def test_conservative_dpo_mixes_both_labels() -> None:
    batch, logprobs = answers(2)
    swapped = batch.with_columns(side=1 - batch["side"])
    plain, other = (evaluate(objective("dpo"), labels, logprobs)[0] for labels in (batch, swapped))
    smoothed = evaluate(objective({"name": "dpo", "label_smoothing": 0.2}), batch, logprobs)[0]
    assert smoothed == pytest.approx(0.8 * plain + 0.2 * other, rel=1e-6)


def one_token_pair(chosen: float, rejected: float) -> tuple[Batch, torch.Tensor]:
    lengths = torch.tensor([2, 2])
    batch = Batch(
        {
            "loss_mask": Jagged(torch.tensor([0.0, 1.0, 0.0, 1.0]), lengths),
            "pair": torch.zeros(2, dtype=torch.int64),
            "side": torch.tensor([0, 1]),
        }
    )
    return batch, torch.tensor([0.0, chosen, 0.0, rejected])


@pytest.mark.parametrize("confident", [-1e-6, -1e-4, -0.3])
@pytest.mark.parametrize("other", [-1e-6, -2.0, -80.0])
def test_odds_of_confident_answers_of_one_token(confident: float, other: float) -> None:
    """Oracle: odds in fp64 by expm1, and the derivative written out by hand."""
    batch, logprobs = one_token_pair(confident, other)
    c, r = logprobs[1].double().item(), logprobs[3].double().item()
    loss, gradient, _ = evaluate(objective("orpo"), batch, logprobs)
    odds = [x - math.log(-math.expm1(x)) for x in (c, r)]
    expected = -c + 0.1 * math.log1p(math.exp(-(odds[0] - odds[1])))
    slope = 0.1 / (1 + math.exp(odds[0] - odds[1]))
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert float(gradient[1]) == pytest.approx(-1 - slope / -math.expm1(c), rel=1e-5)
    assert float(gradient[3]) == pytest.approx(slope / -math.expm1(r), rel=1e-5, abs=1e-12)


def test_odds_of_an_answer_that_fp32_takes_for_certain_are_finite() -> None:
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)):
        loss, gradient, _ = evaluate(objective("orpo"), *one_token_pair(chosen, rejected))
        assert math.isfinite(loss)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", [name for name in EVERY if name != "orpo"])
@pytest.mark.parametrize("beta", [1e-4, 10.0])
def test_extreme_margins_have_finite_losses_and_gradients(name: str, beta: float) -> None:
    batch, logprobs = answers(3, scale=2000.0)
    loss = {"name": name, **({"beta": beta} if name != "slic" else {})}
    found, gradient, metrics = evaluate(objective(loss), batch, logprobs)
    assert math.isfinite(found)
    assert bool(gradient.isfinite().all())
    assert all(math.isfinite(value) for value in metrics.to_dict().values())


def test_the_kl_of_kto_is_that_of_the_mini_batch_and_never_negative() -> None:
    batch, logprobs = answers(4)
    kto = objective("kto")
    micro = batch.take([0, 3, 4])
    _, _, metrics = evaluate(kto, micro, micro.flat("logprobs"), kto.denominators(batch))
    assert metrics.to_dict()["kl"] == pytest.approx(float(batch["kl_log_ratio"].mean()))
    negative = batch.with_columns(kl_log_ratio=-batch["kl_log_ratio"].abs())
    assert evaluate(kto, negative, logprobs)[2].to_dict()["kl"] == 0.0
    assert "kl" not in evaluate(objective("apo-zero-unpaired"), batch, logprobs)[2]


def test_kto_weighs_good_and_bad_answers_and_takes_any_number_of_them() -> None:
    batch, _ = answers(5)
    good = batch.filter(batch["side"] == 0)
    plain, heavy = (
        evaluate(objective({"name": "kto", "desirable_weight": weight}), good, good.flat("logprobs"))[0]
        for weight in (1.0, 3.0)
    )
    assert heavy == pytest.approx(3 * plain, rel=1e-6)


def test_the_likelihood_term_is_per_token_of_chosen_answers() -> None:
    batch, logprobs = answers(6)
    plain, with_term = evaluate(objective("dpo"), batch, logprobs), evaluate(objective(sft_coeff=0.5), batch, logprobs)
    expected = sum(-policy / tokens for policy, _, _, _, tokens, _ in sides(batch)) / 6
    assert with_term[0] - plain[0] == pytest.approx(0.5 * expected, rel=1e-5)
    assert with_term[2].to_dict()["sft_loss"] == pytest.approx(expected, rel=1e-5)


def test_metrics_are_those_of_the_pairs() -> None:
    batch, logprobs = answers(7)
    found = evaluate(objective("dpo"), batch, logprobs)[2].to_dict()
    rewards = [(0.1 * (pc - qc), 0.1 * (pr - qr)) for pc, pr, qc, qr, _, _ in sides(batch)]
    assert found["rewards/margins"] == pytest.approx(sum(c - r for c, r in rewards) / 6, rel=1e-5)
    assert found["rewards/accuracies"] == pytest.approx(sum(c > r for c, r in rewards) / 6)
    assert found["logps/chosen"] == pytest.approx(sum(pair[0] for pair in sides(batch)) / 6, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "where"),
    [
        ({"name": "dpo", "beta": 0}, "beta"),
        ({"name": "kto", "beta": -0.1}, "beta"),
        ({"name": "robust-dpo", "label_smoothing": 0.5}, "label_smoothing"),
        ({"name": "dop"}, "did you mean 'dpop' or 'dpo'"),
    ],
)
def test_parameters_without_a_signal_are_refused(loss: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where):
        PreferenceObjectiveSettings(loss=loss)


def test_a_torn_pair_is_an_error() -> None:
    batch, _ = answers(8)
    torn = batch.take(range(len(batch) - 1))
    with pytest.raises(BatchError, match="one chosen and one rejected row"):
        evaluate(objective("dpo"), torn, torn.flat("logprobs"))


def test_a_missing_reference_is_an_error() -> None:
    batch, logprobs = answers(8)
    with pytest.raises(BatchError, match="needs the column 'ref_answer_logprob'"):
        evaluate(objective("dpo"), batch.drop("ref_answer_logprob"), logprobs)


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_are_declared_to_stay_together(name: str) -> None:
    assert pickle.loads(pickle.dumps(objective(name))).request.together == "pair"
