"""From trees of segments to rows: which tokens are trained, where rewards stand, what rewards are given."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlcore.batch import Batch
from rlcore.engines import RewardResult
from rlcore.engines.episode import PromptSample, Segment, Trajectory
from rlcore.errors import EngineError
from rlcore_recipes.rollouts.scorer import Scorer
from rlcore_recipes.rollouts.trajectories import TreeRows, group_batch
from rlcore_recipes.rollouts.trees import first_rows, trajectory_index

SAMPLE = PromptSample([1, 2], [{"role": "user", "content": "?"}], "truth", "set", position=3)


def sampled(tokens: Sequence[int], parent: int | None = None, **more: Any) -> Segment:
    """A segment of the policy; the log-prob of a token is minus a hundredth of it."""
    logprobs = [-token / 100 for token in tokens]
    return Segment(tokens, True, logprobs, ((5, len(tokens)),), parent, **more)


TREE = Trajectory(
    (
        Segment([1, 2]),
        sampled([10, 11], reward=0.5),  # a call of two sub-agents
        Segment([3], parent=1),
        sampled([12], reward=0.25),  # the first sub-agent
        Segment([4, 5], parent=1),
        sampled([13, 14, 15]),  # the second one
        Segment([6], parent=0),  # the history, written otherwise
        sampled([16]),
    ),
    "length",
    score=2.0,
)
"""Rows: 1 2 10 11 3 12, then 1 2 10 11 4 5 13 14 15, then 1 2 6 16."""


def rows_of(batch: Batch, name: str) -> list[list[float]]:
    return [row.tolist() for row in batch[name].to_list()]


def test_a_leaf_is_a_row_and_shared_tokens_are_trained_in_the_first_row_that_has_them() -> None:
    batch = group_batch(SAMPLE, [TREE], TreeRows())
    assert rows_of(batch, "tokens") == [[1, 2, 10, 11, 3, 12], [1, 2, 10, 11, 4, 5, 13, 14, 15], [1, 2, 6, 16]]
    assert rows_of(batch, "loss_mask") == [[0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1]]
    assert rows_of(batch, "token_version") == [
        [-1, -1, 5, 5, -1, 5],
        [-1, -1, 5, 5, -1, -1, 5, 5, 5],
        [-1, -1, -1, 5],
    ]
    assert rows_of(batch, "rollout_logprobs")[1] == pytest.approx([0, 0, -0.1, -0.11, 0, 0, -0.13, -0.14, -0.15])
    assert rows_of(batch, "step_rewards") == [[0, 0, 0, 0.5, 0, 0.25], [0] * 9, [0] * 4]
    assert batch["trajectory"].tolist() == [3 << 16] * 3
    assert batch["shared_prefix"].tolist() == [0, 4, 2]
    assert batch["prompt_length"].tolist() == [2, 2, 3]
    assert batch["response_length"].tolist() == [3, 5, 1]
    assert batch["finish_reason"] == ["length"] * 3
    assert batch["episode_score"].tolist() == [2, 2, 2]
    assert batch["valid"].all()
    assert batch["invalid"] == [""] * 3


def test_shared_tokens_are_trained_in_every_row_on_request_and_rewarded_once() -> None:
    batch = group_batch(SAMPLE, [TREE], TreeRows("every_row"))
    assert rows_of(batch, "loss_mask")[1] == [0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert float(batch.flat("step_rewards").sum()) == 0.75


def grown(seed: int) -> Trajectory:
    """A tree at random, some of whose segments have no tokens."""
    draw = random.Random(seed)
    segments = [Segment([draw.randrange(9)])]
    for index in range(1, draw.randrange(2, 14)):
        tokens = [draw.randrange(9) for _ in range(draw.randrange(4))]
        parent = draw.randrange(index)
        made = sampled(tokens, parent, reward=draw.choice([None, 1.0])) if draw.random() < 0.6 else Segment(tokens)
        segments.append(replace(made, parent=parent))
    return Trajectory(tuple(segments), "stop")


@pytest.mark.parametrize("seed", range(20))
def test_all_sampled_tokens_of_a_tree_are_trained_once(seed: int) -> None:
    trees = [grown(10 * seed + number) for number in range(3)]
    batch = group_batch(SAMPLE, trees, TreeRows())
    segments = [segment for tree in trees for segment in tree.segments if segment.sampled]
    trained = batch.flat("loss_mask").bool()
    assert sorted(batch.flat("tokens")[trained].tolist()) == sorted(t for segment in segments for t in segment.tokens)
    assert float(batch.flat("step_rewards").sum()) == sum(segment.reward or 0 for segment in segments)
    assert len(batch) == sum(len(tree.rows()) for tree in trees)
    assert trajectory_index(batch).bincount().tolist() == [len(tree.rows()) for tree in trees]
    assert int(first_rows(batch).sum()) == 3
    assert not trained[batch.flat("token_version") < 0].any()


def test_text_of_tools_changes_no_weight_in_the_loss() -> None:
    def weights(text: Sequence[int]) -> torch.Tensor:
        segments = [replace(s, tokens=text) if index in (2, 4, 6) else s for index, s in enumerate(TREE.segments)]
        return group_batch(SAMPLE, [replace(TREE, segments=tuple(segments))], TreeRows()).flat("loss_mask")

    assert torch.equal(weights([10, 11, 12]), weights([16, 0, 7]))
    assert float(weights([3] * 50).sum()) == float(weights([]).sum()) == 7


def test_a_linear_trajectory_has_the_bits_of_a_single_row() -> None:
    linear = [
        Trajectory((Segment([1, 2]), sampled([7, 8]), Segment([9]), sampled([4])), "stop"),
        Trajectory((Segment([1, 2]), sampled([])), "length"),
    ]
    plain, rows = group_batch(SAMPLE, linear), group_batch(SAMPLE, linear, TreeRows())
    assert plain.equals(rows.select(*plain.names))
    assert not set(plain.names) & {"trajectory", "valid", "step_rewards", "transcript"}


def test_invalid_episodes_are_out_of_the_loss_or_have_the_configured_score() -> None:
    broken = replace(TREE, invalid="the tool server is gone")
    unlogged = Trajectory((Segment([1]), Segment([4, 5], True)), "abort", invalid="no log-probs")
    empty = Trajectory((), "abort", invalid="nothing was sampled")
    batch = group_batch(SAMPLE, [TREE, broken, unlogged, empty], TreeRows())
    assert batch["valid"].tolist() == [True] * 3 + [False] * 5
    assert float(batch.filter(~batch["valid"]).flat("loss_mask").sum()) == 0
    assert float(batch.filter(~batch["valid"]).flat("step_rewards").sum()) == 0
    assert rows_of(batch, "tokens")[-1] == [1, 2]
    assert "rollout_logprobs" in batch
    assert batch["invalid"][3:6] == ["the tool server is gone"] * 3
    scored = group_batch(SAMPLE, [broken], TreeRows(error_score=-1.0))
    assert scored["valid"].all()
    assert scored["episode_score"].tolist() == [-1] * 3
    assert float(scored.flat("loss_mask").sum()) == 7
    assert scored["invalid"] == ["the tool server is gone"] * 3


def test_episodes_that_need_rows_of_trees_are_refused_without() -> None:
    for trajectory in (TREE, Trajectory((Segment([1]),), "abort", invalid="gone")):
        with pytest.raises(EngineError, match="episode of prompt 3 branches or is invalid"):
            group_batch(SAMPLE, [trajectory])


def test_rows_have_log_probs_as_the_run_needs_them_whatever_fails() -> None:
    without = Trajectory((Segment([1]), Segment([4], True)), "stop")
    only_prompts = [Trajectory((Segment([1]),), "abort", invalid="no time")] * 2
    for trajectories in (only_prompts, [replace(without, invalid="gone")]):
        for logprobs in (True, False):
            batch = group_batch(SAMPLE, trajectories, TreeRows(logprobs=logprobs))
            assert ("rollout_logprobs" in batch) == logprobs
    with pytest.raises(EngineError, match="sampled tokens without log-probs"):
        group_batch(SAMPLE, [without], TreeRows())


def test_states_of_turns_are_those_that_the_environment_names_or_all_tokens_before() -> None:
    def states(*segments: Segment) -> list[int]:
        batch = group_batch(SAMPLE, [Trajectory(segments, "stop")], TreeRows(turn_state=True))
        return batch.flat("turn_state").tolist()

    named = states(Segment([1]), sampled([2, 3], state="door"), Segment([4]), sampled([5], state="door"))
    assert named[0] == named[3] == 0
    assert named[1] == named[2] == named[4] != 0
    one = states(Segment([1]), sampled([2]), Segment([4]), sampled([5]))
    other = states(Segment([1, 2, 4]), sampled([6]))
    assert one[1] != one[3] == other[3]


class Recording:
    """Scores a sample by the number of tokens that the policy wrote."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def score_batch(self, samples: Sequence[Any]) -> list[RewardResult]:
        self.seen += samples
        return [RewardResult(float(len(sample.completion_tokens))) for sample in samples]


class Numbers:
    """A tokenizer whose tokens are numbers."""

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def test_a_trajectory_is_scored_once_by_what_the_policy_wrote() -> None:
    linear = Trajectory((Segment([1]), sampled([7, 8]), Segment([9]), sampled([4], reward=0.5)), "stop")
    gone = replace(TREE, invalid="gone")
    batch = group_batch(SAMPLE, [TREE, gone, linear], TreeRows())
    reward: Any = Recording()
    found = Scorer(reward, Numbers()).score(batch)
    assert [sample.completion for sample in reward.seen] == ["10 11\n12\n13 14 15\n16", "7 8\n4"]
    assert [sample.completion_tokens for sample in reward.seen] == [[10, 11, 12, 13, 14, 15, 16], [7, 8, 4]]
    assert found["score"].tolist() == [7.75] * 3 + [0] * 3 + [3.5]  # the rewards of turns are in addition
    assert [result.error for result in found["reward_result"]] == [None] * 3 + ["invalid"] * 3 + [None]
    assert found["completion"][3] == "10 11\n12\n13 14 15\n16"
    reward.seen.clear()
    again = Scorer(reward, Numbers()).score(group_batch(SAMPLE, [TREE], TreeRows("every_row")))
    assert reward.seen[0].completion_tokens == [10, 11, 12, 13, 14, 15, 16]
    assert math.isclose(float(again["score"][0]), 7.75)
