"""Credit in trajectories of several rows, against sums by hand over the segments of their trees."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from rlcore.algorithms.objectives import PolicyObjective, PolicyObjectiveSettings
from rlcore.algorithms.shaping import OverlongSettings
from rlcore.batch import Batch
from rlcore.engines import RewardResult
from rlcore.engines.episode import PromptSample, Segment, Trajectory
from rlcore_recipes.rollouts.trajectories import TreeRows, group_batch
from rlcore_recipes.rollouts.trees import by_trajectories, first_rows, trajectory_index, turn_rewards
from rlcore_recipes.settings import AlgorithmSettings
from rlcore_recipes.settings.reinforcement import credit_problems
from rlcore_recipes.step.advantages import contained_advantages
from rlcore_recipes.step.metrics import batch_metrics
from rlcore_recipes.step.update import kept_parts, mini_batches, without_zero_advantage
from rlcore_recipes.step.validation import metrics_and_table

VOCABULARY = 40


def episode(seed: int, invalid: bool = False) -> Trajectory:
    """A tree at random, whose segments have distinct tokens, so that a token's segment can be found again."""
    draw = random.Random(seed)
    segments: list[Segment] = [Segment([1])]
    for index in range(1, draw.randrange(2, 9)):
        tokens = [10 * index + place for place in range(draw.randrange(1, 4))]
        parent = draw.choice([index - 1, draw.randrange(index)])
        if draw.random() < 0.7:
            reward = draw.choice([None, draw.gauss(0, 1)])
            segments.append(Segment(tokens, True, [-1.0] * len(tokens), parent=parent, reward=reward))
        else:
            segments.append(Segment(tokens, parent=parent))
    return Trajectory(tuple(segments), "stop", score=draw.gauss(0, 1), invalid="gone" if invalid else "")


SHARED = Trajectory(
    (
        Segment([1]),
        Segment([10, 11], True, [-1.0, -1.0], reward=0.5),
        Segment([20], parent=1),
        Segment([30], True, [-1.0], reward=-1.0),
        Segment([40, 41], parent=1),
        Segment([50, 51], True, [-1.0, -1.0]),
        Segment([60], parent=3),
        Segment([70, 71], True, [-1.0, -1.0], reward=2.0),
    ),
    "stop",
    score=1.0,
)
GROUPS = {5: [episode(1), episode(2, invalid=True), episode(3), episode(4)], 9: [episode(5), SHARED, episode(7)]}
TREES = [tree for trees in GROUPS.values() for tree in trees]


def scored(trees: TreeRows, groups: dict[int, list[Trajectory]] = GROUPS) -> Batch:
    """Batches of `GROUPS` with the scores that their episodes give."""
    parts = [group_batch(PromptSample([1], [], position=number), group, trees) for number, group in groups.items()]
    batch = Batch.concat(parts)
    scores = torch.nan_to_num(batch["episode_score"]) + turn_rewards(batch)[trajectory_index(batch)]
    results = [RewardResult(0.0, error=None if valid else "invalid") for valid in batch["valid"].tolist()]
    return batch.with_columns(score=scores, reward_result=results, completion=["text"] * len(batch))


def estimated(batch: Batch, **settings: Any) -> Batch:
    columns, _, _, said = contained_advantages(batch, AlgorithmSettings(**settings), None, 100)
    assert not said
    return batch.with_columns(**{name: columns[name] for name in columns.names})


def total(tree: Trajectory) -> float:
    assert tree.score is not None
    return tree.score + sum(segment.reward or 0.0 for segment in tree.segments)


def normalised(value: float, others: Sequence[float]) -> float:
    return (value - mean(others)) / (stdev(others) + 1e-6)


def by_segment(batch: Batch, trees: Sequence[Trajectory]) -> list[dict[int, list[list[float]]]]:
    """For each tree, the advantages of the trained tokens of every segment, in each row that trains it."""
    found: list[dict[int, list[list[float]]]] = []
    rows = iter(batch.select("loss_mask", "advantages").rows())
    for tree in trees:
        of_tree: dict[int, list[list[float]]] = {}
        for path in tree.rows():
            row, start = next(rows), 0
            for index in path:
                end = start + len(tree.segments[index].tokens)
                if row["loss_mask"][start:end].any():
                    of_tree.setdefault(index, []).append(row["advantages"][start:end].tolist())
                start = end
        found.append(of_tree)
    return found


def expect(found: list[dict[int, list[list[float]]]], expected: Callable[[Trajectory, int], float]) -> None:
    for tree, of_tree in zip(TREES, found, strict=True):
        sampled = [i for i, segment in enumerate(tree.segments) if segment.sampled and not tree.invalid]
        assert sorted(of_tree) == sampled
        for index, copies in of_tree.items():
            for values in copies:
                assert values == pytest.approx([expected(tree, index)] * len(values), rel=1e-4, abs=1e-5)


def mates(tree: Trajectory) -> list[Trajectory]:
    group = next(group for group in GROUPS.values() if any(other is tree for other in group))
    return [other for other in group if not other.invalid]


@pytest.mark.parametrize("shared", ["once", "every_row"])
def test_grpo_counts_a_valid_trajectory_once_and_gives_all_of_its_rows_the_same(shared: Any) -> None:
    batch = estimated(scored(TreeRows(shared)), shared_tokens=shared)
    expect(by_segment(batch, TREES), lambda tree, _: normalised(total(tree), [total(o) for o in mates(tree)]))
    copies = [len(rows) for of_tree in by_segment(batch, TREES) for rows in of_tree.values()]
    assert (max(copies) > 1) == (shared == "every_row")


@pytest.mark.parametrize("name", ["rloo", "gpg", "opo", "pass_at_k", "reinforce_plus_plus_baseline"])
def test_estimators_give_a_tree_what_they_give_its_tokens_in_one_row(name: str) -> None:
    """Whatever an estimator reads (lengths, numbers of samples, all trained tokens), a tree is one sample."""

    def in_one_row(tree: Trajectory) -> Trajectory:
        order = sorted(
            {index: None for path in tree.rows() for index in path}, key=lambda index: first_leaf(tree, index)
        )
        return replace(tree, segments=tuple(replace(tree.segments[index], parent=None) for index in order))

    def first_leaf(tree: Trajectory, index: int) -> tuple[int, int]:
        return next((number, path.index(index)) for number, path in enumerate(tree.rows()) if index in path)

    linear = {number: [in_one_row(tree) for tree in group if not tree.invalid] for number, group in GROUPS.items()}
    one, several = estimated(scored(TreeRows(), linear), advantage=name), estimated(scored(TreeRows()), advantage=name)
    values = [batch.flat("advantages")[batch.flat("loss_mask").bool()] for batch in (one, several)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    assert values[0].any()


def turns_in(tree: Trajectory) -> list[tuple[list[int], float]]:
    """The segments of each turn, and what it and later turns earned at half the worth; turns are in the order of rows,
    and segments of the policy without others between them are one turn."""
    order = list(dict.fromkeys(index for path in tree.rows() for index in path))
    runs: list[list[int]] = []
    for before, index in zip([0, *order], order):
        if tree.segments[index].sampled:
            follows = tree.segments[before].sampled and tree.segments[index].parent == before
            runs = [*runs[:-1], [*runs[-1], index]] if follows else [*runs, [index]]
    rewards = [sum(tree.segments[index].reward or 0.0 for index in run) for run in runs]
    if not runs:
        return []
    rewards[-1] += tree.score or 0.0
    return [(run, sum(0.5**k * reward for k, reward in enumerate(rewards[i:]))) for i, run in enumerate(runs)]


@pytest.mark.parametrize("shared", ["once", "every_row"])
def test_credit_of_turns_is_what_they_and_later_ones_earned(shared: Any) -> None:
    def expected(tree: Trajectory, index: int) -> float:
        everything = [value for other in mates(tree) for _, value in turns_in(other) or [([], total(other))]]
        return normalised(next(value for run, value in turns_in(tree) if index in run), everything)

    batch = estimated(scored(TreeRows(shared)), shared_tokens=shared, credit="turn", turn_discount=0.5)
    expect(by_segment(batch, TREES), expected)


def branch_values(tree: Trajectory) -> list[float]:
    assert tree.score is not None
    return [tree.score + sum(tree.segments[index].reward or 0.0 for index in path) for path in tree.rows()]


def test_credit_of_branches_is_the_mean_over_the_branches_that_share_a_token() -> None:
    def expected(tree: Trajectory, index: int) -> float:
        others = [value for other in mates(tree) for value in branch_values(other)]
        own = [normalised(v, others) for v, path in zip(branch_values(tree), tree.rows()) if index in path]
        return mean(own)

    expect(by_segment(estimated(scored(TreeRows()), credit="branch"), TREES), expected)


def test_credit_of_branches_is_their_own_where_every_row_trains_its_tokens() -> None:
    batch = estimated(scored(TreeRows("every_row")), credit="branch", shared_tokens="every_row")
    for tree, of_tree in zip(TREES, by_segment(batch, TREES), strict=True):
        others = [value for other in mates(tree) for value in branch_values(other)] if not tree.invalid else []
        for index, copies in of_tree.items():
            own = [normalised(v, others) for v, path in zip(branch_values(tree), tree.rows()) if index in path]
            assert [copy[0] for copy in copies] == pytest.approx(own, rel=1e-4, abs=1e-5)


def test_long_rows_are_punished_once_and_answers_of_tools_are_not_counted() -> None:
    long = Trajectory(
        (Segment([1]), Segment([2] * 4, True), Segment([3] * 50), Segment([4] * 5, True)), "stop", score=1.0
    )
    branch = Trajectory(
        (Segment([1]), Segment([2] * 8, True), Segment([5], parent=0), Segment([2] * 7, True)), "stop", score=1.0
    )
    batch = scored(TreeRows(logprobs=False), {0: [long, branch]})
    settings = AlgorithmSettings(advantage="rloo", overlong=OverlongSettings(buffer=5, factor=1.0))
    columns, metrics, _, _ = contained_advantages(batch, settings, None, 10)
    # 9 and 8 policy tokens of 10, of which the last 5 are punished: -0.8 and -0.6
    assert metrics.to_dict()["reward/overlong_punishment"] == pytest.approx(-0.7)
    advantages = columns.flat("advantages")[batch.flat("loss_mask").bool()]
    assert advantages.tolist() == pytest.approx([-0.2] * 9 + [0.2] * 15)


def loss_and_gradient(parts: Sequence[Batch], objective: PolicyObjective) -> tuple[float, torch.Tensor]:
    """The loss of a table of log-probs by context: a token's own is that of all tokens of its row before it."""
    weights = torch.linspace(-1, 1, VOCABULARY * 97, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        denominators = objective.denominators(part)
        for row in range(len(part)):  # as micro-batches of one row
            micro = part.slice(row, row + 1)
            context = [
                hash((0, *micro.flat("tokens")[: t + 1].tolist())) % len(weights) for t in range(micro.total_tokens)
            ]
            outputs = {"logprobs": weights[context], "entropy": weights[context].square()}
            total = total + objective.loss(outputs, micro, denominators)[0]
    total.backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    return float(total.detach()), weights.grad


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_the_gradient_is_that_of_every_sampled_token_trained_once(aggregation: str) -> None:
    """A path through the tree gives each token's context; the loss over all segments, each once, is the oracle."""
    objective = PolicyObjective(
        PolicyObjectiveSettings(policy_loss="reinforce", aggregation=aggregation, entropy_coeff=0.1)
    )
    batch = estimated(scored(TreeRows()))
    found, gradient = loss_and_gradient(mini_batches(batch, 100), objective)

    weights = torch.linspace(-1, 1, VOCABULARY * 97, dtype=torch.float64, requires_grad=True)
    losses, lengths = [], []
    for tree in (tree for tree in TREES if not tree.invalid):
        advantage, trained = normalised(total(tree), [total(other) for other in mates(tree)]), []
        for index, segment in enumerate(tree.segments):
            path = next(path for path in tree.rows() if index in path)
            before = [token for i in path[: path.index(index)] for token in tree.segments[i].tokens]
            for place in range(len(segment.tokens)) if segment.sampled else ():
                context = weights[hash((0, *before, *segment.tokens[: place + 1])) % len(weights)]
                trained.append(-advantage * context - 0.1 * context.square())
        losses.append(torch.stack(trained).sum() if trained else weights.sum() * 0)
        lengths.append(len(trained))
    n = sum(length > 0 for length in lengths)
    expected = {
        "token-mean": sum(losses) / sum(lengths),
        "seq-mean-token-sum": sum(losses) / n,
        "seq-mean-token-mean": sum(loss / max(length, 1) for loss, length in zip(losses, lengths)) / n,
    }[aggregation]
    assert isinstance(expected, torch.Tensor)
    expected.backward()  # type: ignore[no-untyped-call]
    assert found == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, weights.grad, rtol=1e-4, atol=1e-6)

    kept, counting = without_zero_advantage(mini_batches(batch, 100)[0], objective, keep=1)
    again = loss_and_gradient([kept], counting)  # type: ignore[arg-type]
    assert len(kept) < len(batch) or again[0] == pytest.approx(found)


def test_mini_batches_are_counted_in_trajectories() -> None:
    batch = estimated(scored(TreeRows()))
    parts = mini_batches(batch, 2)
    assert len(parts) == math.ceil(len(TREES) / 2)
    ids = [set(part["trajectory"].tolist()) for part in parts]
    assert sorted(number for part in ids for number in part) == sorted(
        {*batch["trajectory"][batch["valid"]].tolist()}
    )  # those of the invalid one are left out
    assert [len(part) for part in by_trajectories(batch, 7)] == [len(batch)]
    weights = batch.with_columns(sample_weight=torch.ones(len(batch)))
    assert [int(first_rows(part).sum()) for part in kept_parts(weights, 3)] == [2, 2, 3]


def test_metrics_are_those_of_trajectories() -> None:
    batch = estimated(scored(TreeRows()))
    found = batch_metrics(batch)
    valid = [tree for tree in TREES if not tree.invalid]
    assert found["critic/score/mean"] == pytest.approx(mean(map(total, valid)), rel=1e-5)
    assert found["critic/rewards/mean"] == pytest.approx(found["critic/score/mean"], rel=1e-5)
    longest = [max(sum(len(t.segments[i].tokens) for i in p if t.segments[i].sampled) for p in t.rows()) for t in valid]
    assert found["response_length/mean"] == pytest.approx(mean(longest))
    assert found["rollout/invalid_episodes"] == 1
    assert found["rollout/invalid_ratio"] == pytest.approx(1 / 7)
    assert found["rollout/rows_per_episode"] == pytest.approx(sum(len(tree.rows()) for tree in TREES) / 7)
    metrics, table = metrics_and_table(batch.with_columns(data_source=["game"] * len(batch)), 100)
    assert metrics["val-core/game/reward/mean@4"] == pytest.approx(
        mean(mean(total(tree) for tree in group if not tree.invalid) for group in GROUPS.values()), rel=1e-5
    )
    assert metrics["val-aux/rollout/invalid_ratio"] == pytest.approx(1 / 7)
    assert len(table.rows) == 7


def test_a_step_of_invalid_episodes_alone_trains_nothing() -> None:
    gone = {0: [replace(tree, invalid="gone") for tree in TREES[:3]]}
    batch = estimated(scored(TreeRows(), gone))
    assert not batch.flat("advantages").any()
    assert batch_metrics(batch)["rollout/invalid_ratio"] == 1
    [part] = mini_batches(batch, 3)
    assert PolicyObjective(PolicyObjectiveSettings()).denominators(part) == {"tokens": 0, "sequences": 0}


@pytest.mark.parametrize(
    ("settings", "episodes", "key", "message"),
    [
        ({"credit": "branch"}, False, "algorithm.credit", "there is no rollout.environment"),
        ({"shared_tokens": "every_row"}, False, "algorithm.shared_tokens", "there is no rollout.environment"),
        (
            {"credit": "turn", "advantage": "gigpo"},
            True,
            "algorithm.credit",
            "gigpo compares trajectories and their turns",
        ),
        (
            {"credit": "turn", "advantage": "gae"},
            True,
            "algorithm.credit",
            "gae does not compare the samples of a prompt",
        ),
        ({"turn_discount": 0.5}, True, "algorithm.turn_discount", "is for algorithm.credit=turn, which is trajectory"),
    ],
)
def test_credit_that_cannot_be_assigned_is_refused(
    settings: dict[str, Any], episodes: bool, key: str, message: str
) -> None:
    [(found, why)] = credit_problems(AlgorithmSettings(**settings), episodes)
    assert found == key
    assert message in why
    assert not list(credit_problems(AlgorithmSettings(credit="turn", turn_discount=0.5), True))
