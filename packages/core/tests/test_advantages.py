"""Every advantage estimator against its formula written out in loops, in fp64, to 1e-10."""

from __future__ import annotations

import math
import random
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore.algorithms import advantages
from rlcore.algorithms.discounted import discounted_suffix_sums
from rlcore.batch import Batch, Jagged

TOLERANCE = 1e-10
BUILT_IN = [entry for entry in advantages if entry.function.__module__.startswith("rlcore.")]
"""The estimators of this package, without those of installed plugins."""
seeds = given(seed=st.integers(0, 2**32 - 1))
quick = settings(max_examples=40, deadline=None)


def ragged(seed: int, *, min_group: int = 1, stray_rewards: bool = True) -> Batch:
    """Groups of different sizes in mixed order; sequences may be empty, or have no trained token."""
    rng = random.Random(seed)
    groups = [label for label in (7, 3, 11, 5)[: rng.randint(1, 4)] for _ in range(rng.randint(min_group, 4))]
    rng.shuffle(groups)
    lengths = [rng.choice([0, 1, 2, 5, 9]) for _ in groups]
    total = sum(lengths)
    mask = [float(rng.random() < 0.7) for _ in range(total)]
    rewards = [rng.gauss(0, 1) * (rng.random() < 0.5) for _ in range(total)]
    if not stray_rewards:
        rewards = [reward * trained for reward, trained in zip(rewards, mask)]
    size = torch.tensor(lengths)

    def column(values: list[float]) -> Jagged:
        return Jagged(torch.tensor(values, dtype=torch.float64), size)

    return Batch(
        {
            "loss_mask": column(mask),
            "token_rewards": column(rewards),
            "values": column([rng.gauss(0, 1) for _ in range(total)]),
            "process_rewards": column([rng.gauss(0, 1) for _ in range(total)]),
            "turn_state": Jagged(torch.tensor([rng.randrange(3) for _ in range(total)]), size),
            "group": torch.tensor(groups),
            "sample_weight": torch.tensor([rng.random() for _ in groups], dtype=torch.float64),
            "baseline_score": torch.tensor([rng.gauss(0, 1) for _ in groups], dtype=torch.float64),
        }
    )


def rows(batch: Batch) -> list[dict]:
    result = []
    for row in batch.rows():
        plain = {name: value.tolist() for name, value in row.items()}
        plain["trained"] = [t > 0 and bool(m) for t, m in enumerate(plain["loss_mask"])]
        plain["score"] = sum(plain["token_rewards"])
        result.append(plain)
    return result


def spread(batch: Batch, values: list[float]) -> list[float]:
    return [v if trained else 0.0 for row, v in zip(rows(batch), values) for trained in row["trained"]]


def whitened(tokens: list[float], batch: Batch) -> list[float]:
    trained = [flag for row in rows(batch) for flag in row["trained"]]
    chosen = [x for x, flag in zip(tokens, trained) if flag]
    mu = mean(chosen) if chosen else 0.0
    variance = stdev(chosen) ** 2 if len(chosen) > 1 else 0.0
    return [(x - mu) / math.sqrt(variance + 1e-8) if flag else 0.0 for x, flag in zip(tokens, trained)]


def peers(batch: Batch) -> list[tuple[dict, list[dict]]]:
    """Each sample with all of its group, itself included."""
    samples = rows(batch)
    return [(own, [other for other in samples if other["group"] == own["group"]]) for own in samples]


def deviations(batch: Batch) -> list[float]:
    return [own["score"] - mean(p["score"] for p in group) for own, group in peers(batch)]


def compute(name: str, batch: Batch, **params: object) -> torch.Tensor:
    entry = advantages.get(name)
    return entry.function(batch, entry.params(**params)).advantages


def assert_close(actual: torch.Tensor, expected: list[float]) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=TOLERANCE, atol=TOLERANCE, check_stride=False
    )


@pytest.mark.parametrize("normalize_std", [True, False])
@quick
@seeds
def test_grpo(normalize_std: bool, seed: int) -> None:
    batch = ragged(seed)
    expected = []
    for deviation, (_, group) in zip(deviations(batch), peers(batch)):
        sigma = stdev([p["score"] for p in group]) if len(group) > 1 else 1.0
        expected.append(deviation / (sigma + 1e-6) if normalize_std else deviation)
    assert_close(compute("grpo", batch, normalize_std=normalize_std), spread(batch, expected))


@quick
@seeds
def test_rloo_subtracts_the_mean_of_the_others(seed: int) -> None:
    batch = ragged(seed)
    samples = rows(batch)
    expected = []
    for i, own in enumerate(samples):
        others = [p["score"] for j, p in enumerate(samples) if j != i and p["group"] == own["group"]]
        expected.append(own["score"] - mean(others) if others else 0.0)
    assert_close(compute("rloo", batch), spread(batch, expected))


@quick
@seeds
def test_reinforce_plus_plus_baseline(seed: int) -> None:
    batch = ragged(seed)
    expected = whitened(spread(batch, deviations(batch)), batch)
    assert_close(compute("reinforce_plus_plus_baseline", batch), expected)


@quick
@seeds
def test_opo_weighs_the_baseline_by_length(seed: int) -> None:
    batch = ragged(seed)
    expected = []
    for own, group in peers(batch):
        sizes = [sum(p["trained"]) for p in group]
        weighted = sum(size * p["score"] for size, p in zip(sizes, group))
        expected.append(own["score"] - weighted / sum(sizes) if sum(sizes) else 0.0)
    assert_close(compute("opo", batch), spread(batch, expected))


@quick
@seeds
def test_gpg_rescales_by_groups_whose_scores_differ(seed: int) -> None:
    batch = ragged(seed)
    equal = sum(len({p["score"] for p in group}) == 1 for _, group in peers(batch))
    alpha = len(batch) / max(len(batch) - equal, 1)
    assert_close(compute("gpg", batch), spread(batch, [alpha * d for d in deviations(batch)]))


@pytest.mark.parametrize("normalize_std", [True, False])
@quick
@seeds
def test_pass_at_k_trains_only_the_best(normalize_std: bool, seed: int) -> None:
    batch = ragged(seed, min_group=2)
    expected, taken = [], set()
    for own, group in peers(batch):
        scores = sorted((p["score"] for p in group), reverse=True)
        best = own["score"] == scores[0] and own["group"] not in taken
        lead = scores[0] - scores[1] if best else 0.0
        if best:
            taken.add(own["group"])
        expected.append(lead / (stdev(scores) + 1e-6) if normalize_std else lead)
    assert_close(compute("pass_at_k", batch, normalize_std=normalize_std), spread(batch, expected))


def test_gpg_by_hand() -> None:
    """Zero is a score as any other: of six samples, two are in a group of equal scores."""
    scores = [0.0, 1.0, -1.0, 0.0, 0.0, 0.0]
    batch = Batch(
        {
            "loss_mask": Jagged(torch.ones(12), torch.full((6,), 2)),
            "token_rewards": Jagged(torch.tensor([x for score in scores for x in (0.0, score)]), torch.full((6,), 2)),
            "group": torch.tensor([0, 0, 1, 1, 2, 2]),
        }
    )
    assert compute("gpg", batch)[1::2].tolist() == [-0.75, 0.75, -0.75, 0.75, 0.0, 0.0]


@pytest.mark.parametrize("name", [entry.name for entry in BUILT_IN if "compares_group" in entry.traits])
def test_a_sample_alone_in_its_group_has_no_advantage(name: str) -> None:
    """Its score would be an advantage without a baseline, and changes nothing. The other groups get what they get
    without it."""
    batch = ragged(0, min_group=2)
    others = batch.select("loss_mask", "token_rewards", "group", "process_rewards", "turn_state")

    def with_one_alone(score: float) -> list[torch.Tensor]:
        tokens, one = torch.tensor([0.0, 0.3, score], dtype=torch.float64), torch.tensor([3])
        rewards = Jagged(tokens, one)
        ones, zeros = (rewards.with_values(torch.full_like(tokens, value)) for value in (1.0, 0.0))
        columns = {"loss_mask": ones, "token_rewards": rewards, "process_rewards": zeros}
        columns["turn_state"] = rewards.with_values(torch.zeros(3, dtype=torch.int64))
        joined = Batch.concat([Batch({**columns, "group": torch.tensor([99])}), others])
        return joined.jagged(compute(name, joined)).to_list()

    actual = with_one_alone(0.4)
    torch.testing.assert_close(actual, with_one_alone(40.0), rtol=0, atol=0)
    if name in ("reinforce_plus_plus_baseline", "prime"):  # which whiten: the batch's mean is taken from the 0 too
        assert actual[0][1:].unique().numel() == 1  # no token predicts the first
        return
    assert actual[0].abs().max() == 0
    if name != "gpg":  # which is scaled by the share of groups with a signal
        torch.testing.assert_close(torch.cat(actual[1:]), compute(name, others), rtol=1e-12, atol=1e-12)


def discounted_oracle(row: dict, gamma: float) -> list[float]:
    out, running = [0.0] * len(row["trained"]), 0.0
    for t in reversed(range(len(out))):
        if row["trained"][t]:
            running = row["token_rewards"][t] + gamma * running
            out[t] = running
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@quick
@seeds
def test_reinforce_plus_plus(gamma: float, seed: int) -> None:
    batch = ragged(seed, stray_rewards=False)
    returns = [x for row in rows(batch) for x in discounted_oracle(row, gamma)]
    assert_close(compute("reinforce_plus_plus", batch, gamma=gamma), whitened(returns, batch))


@quick
@seeds
def test_remax_subtracts_the_greedy_score(seed: int) -> None:
    batch = ragged(seed, stray_rewards=False)
    expected = [
        x - row["baseline_score"] if trained else 0.0
        for row in rows(batch)
        for x, trained in zip(discounted_oracle(row, 1.0), row["trained"])
    ]
    assert_close(compute("remax", batch), expected)


def gae_oracle(batch: Batch, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """The recursion over all tokens; those not trained on carry V' and A' through."""
    result, returns = [], []
    for row in rows(batch):
        next_value, next_advantage = 0.0, 0.0
        out = [0.0] * len(row["trained"])
        for t in reversed(range(len(out))):
            if row["trained"][t]:
                delta = row["token_rewards"][t] + gamma * next_value - row["values"][t]
                next_advantage = out[t] = delta + gamma * lam * next_advantage
                next_value = row["values"][t]
        result += out
        returns += [a + v if trained else 0.0 for a, v, trained in zip(out, row["values"], row["trained"])]
    return result, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("whiten", [True, False])
@quick
@seeds
def test_gae(gamma: float, lam: float, whiten: bool, seed: int) -> None:
    batch = ragged(seed, stray_rewards=False)
    entry = advantages.get("gae")
    actual = entry.function(batch, entry.params(gamma=gamma, lam=lam, whiten=whiten))
    expected, returns = gae_oracle(batch, gamma, lam)
    assert_close(actual.advantages, whitened(expected, batch) if whiten else expected)
    assert actual.returns is not None
    assert_close(actual.returns, returns)


@quick
@seeds
def test_reward_between_trained_tokens_belongs_to_the_one_before(seed: int) -> None:
    """Moving every such reward by hand gives the same; one before the first trained token has no token to credit."""
    batch = ragged(seed)
    moved = []
    for row in rows(batch):
        rewards, owner = [0.0] * len(row["trained"]), None
        for t, reward in enumerate(row["token_rewards"]):
            owner = t if row["trained"][t] else owner
            if owner is not None:
                rewards[owner] += reward
        moved += rewards
    by_hand = batch.with_columns(token_rewards=batch.jagged(torch.tensor(moved, dtype=torch.float64)))
    for name in ("gae", "reinforce_plus_plus", "remax"):
        torch.testing.assert_close(compute(name, batch), compute(name, by_hand), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("discount", [1.0, 0.99, 0.3, 0.0])
def test_suffix_sums_of_long_sequences(discount: float) -> None:
    """Longer than one run of sequences and than the reach of the smaller discounts; fp32 against an fp64 loop."""
    lengths = torch.tensor([70_000, 0, 1, 3_000, 65_536, 2])
    values = torch.randn(int(lengths.sum()), generator=torch.Generator().manual_seed(0))
    expected, start = [], 0
    for length in lengths.tolist():
        running, out = 0.0, [0.0] * length
        for t in reversed(range(length)):
            running = float(values[start + t]) + discount * running
            out[t] = running
        expected += out
        start += length
    actual = discounted_suffix_sums(values, lengths, discount)
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "gpg", "pass_at_k", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e6 + 0.3])
def test_equal_scores_give_exactly_zero(name: str, score: float) -> None:
    lengths = torch.tensor([3, 5, 4])
    rewards = torch.zeros(12)
    rewards[[2, 7, 11]] = score
    batch = Batch(
        {
            "loss_mask": Jagged(torch.ones(12, dtype=torch.int64), lengths),
            "token_rewards": Jagged(rewards, lengths),
            "group": torch.zeros(3, dtype=torch.int64),
        }
    )
    assert compute(name, batch).abs().max() == 0


@pytest.mark.parametrize("name", [entry.name for entry in BUILT_IN])
@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [2], [3, 0]])
def test_degenerate_batches(name: str, lengths: list[int]) -> None:
    """Nothing to train on, or a single token: finite, of the right size, in the dtype of the rewards."""
    size = torch.tensor(lengths, dtype=torch.int64)
    total = sum(lengths)
    batch = Batch(
        {
            "loss_mask": Jagged(torch.ones(total), size),
            "token_rewards": Jagged(torch.ones(total), size),
            "values": Jagged(torch.ones(total), size),
            "process_rewards": Jagged(torch.ones(total), size),
            "turn_state": Jagged(torch.ones(total, dtype=torch.int64), size),
            "sample_weight": torch.ones(len(lengths)),
            "group": torch.zeros(len(lengths), dtype=torch.int64),
            "baseline_score": torch.zeros(len(lengths)),
        }
    )
    result = compute(name, batch)
    assert result.shape == (total,)
    assert result.dtype == torch.float32
    assert result.isfinite().all()
