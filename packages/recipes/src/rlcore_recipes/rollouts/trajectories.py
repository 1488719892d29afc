"""From trajectories to a batch: one row for every path from the root of a trajectory to a leaf."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines.episode import PromptSample, Segment, Trajectory
from rlcore.errors import EngineError
from rlcore_recipes.rollouts.trees import token_places

EPISODES = 1 << 16
"""Numbers of episodes of a prompt; a trajectory is the prompt's position times this, plus the number of its episode."""


@dataclass(frozen=True)
class TreeRows:
    """How trees of segments become rows. Runs whose episodes are single completions have none.

    Attributes:
        shared_tokens: train tokens that several rows of a trajectory share "once", in the first one, or in "every_row".
        error_score: score of an invalid episode; None: nothing is learned from it.
        turn_state: whether rows have the column ``turn_state``.
        logprobs: whether they have ``rollout_logprobs``, which valid trajectories need then.
    """

    shared_tokens: Literal["once", "every_row"] = "once"
    error_score: float | None = None
    turn_state: bool = False
    logprobs: bool = True


@dataclass(frozen=True)
class _Row:
    """A path of segments.

    Attributes:
        number: of the row's trajectory.
        shared: how many of the segments an earlier row of the trajectory has too.
    """

    number: int
    trajectory: Trajectory
    segments: tuple[Segment, ...]
    shared: int

    @property
    def ends(self) -> list[int]:
        """The number of tokens up to the end of each segment."""
        total, ends = 0, []
        for segment in self.segments:
            total += len(segment.tokens)
            ends.append(total)
        return ends

    @property
    def length(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def prompt_length(self) -> int:
        """The number of tokens before the first sampled segment."""
        total = 0
        for segment in self.segments:
            if segment.sampled:
                break
            total += len(segment.tokens)
        return total


def group_batch(sample: PromptSample, trajectories: Sequence[Trajectory], trees: TreeRows | None = None) -> Batch:
    """Return the trajectories of one sample as a batch, the rows of a trajectory next to each other.

    Per token: ``tokens`` int64, ``loss_mask`` fp32 (1 on sampled tokens), ``rollout_logprobs`` fp32 (0 on others; only
    if all sampled segments have them), ``token_version`` int32 (of the policy that sampled the token; -1 on others).
    Per row: ``group`` (the prompt's position in the data stream), ``prompt_length``, ``response_length`` (sampled
    tokens), ``policy_version`` (of the oldest sampled token), ``later_version_tokens`` (sampled by another version than
    the first one), all int64. Objects: ``finish_reason``, ``messages``, ``prompt_text`` (None for chat prompts),
    ``ground_truth``, ``data_source``, ``extra``.

    With ``trees`` also the columns of `tree_columns`. ``loss_mask`` is then 0 on tokens of invalid trajectories, and as
    ``trees.shared_tokens`` says on those that an earlier row of the trajectory has.

    Raises:
        EngineError: a trajectory branches or is invalid, without ``trees``; or lacks the log-probs that these say.
    """
    rows = list(_rows(sample, trajectories))
    if trees is None:
        _check_single(sample, rows)
    segments = [segment for row in rows for segment in row.segments]
    sizes = torch.tensor([len(segment.tokens) for segment in segments], dtype=torch.int64)
    sampled = torch.tensor([segment.sampled for segment in segments], dtype=torch.bool).repeat_interleave(sizes)
    values = torch.tensor(list(chain.from_iterable(segment.tokens for segment in segments)), dtype=torch.int64)
    tokens = Jagged(values, torch.tensor([row.length for row in rows]))
    made = [_versions(row.segments) for row in rows]
    token_version = torch.full((len(values),), -1, dtype=torch.int32)
    token_version[sampled] = torch.cat(made)
    batch = Batch(
        {
            "tokens": tokens,
            "loss_mask": tokens.with_values(sampled.float()),
            **_logprobs(tokens, rows, sampled, trees),
            "token_version": tokens.with_values(token_version),
            "group": torch.full((len(rows),), sample.position, dtype=torch.int64),
            "prompt_length": torch.tensor([row.prompt_length for row in rows]),
            "response_length": torch.tensor([len(versions) for versions in made]),
            "policy_version": torch.tensor([int(versions.min()) if len(versions) else 0 for versions in made]),
            "later_version_tokens": torch.tensor([int((versions != versions[:1]).sum()) for versions in made]),
            "finish_reason": [row.trajectory.finish_reason for row in rows],
            "messages": [sample.messages] * len(rows),
            "prompt_text": [sample.text] * len(rows),
            "ground_truth": [sample.ground_truth] * len(rows),
            "data_source": [sample.data_source] * len(rows),
            "extra": [{**sample.extra, **row.trajectory.info} if row.trajectory.info else sample.extra for row in rows],
        }
    )
    return batch if trees is None else batch.with_columns(**tree_columns(sample, rows, batch, trees))


def tree_columns(sample: PromptSample, rows: Sequence[_Row], batch: Batch, trees: TreeRows) -> dict[str, Any]:
    """Return the columns that rows of trees have in addition, and their ``loss_mask``.

    Per row: ``trajectory`` int64 (the same in all rows of a trajectory, and in no other), ``shared_prefix`` int64
    (leading tokens that an earlier row of the trajectory has too), ``episode_score`` fp32 (NaN where the episode gives
    none), ``valid`` bool. Per token: ``step_rewards`` fp32 (the reward of a turn, on its last token, in the first row
    that has the turn) and ``turn_state`` int64 (a hash of what the policy knew at its turn, on the tokens of the turn;
    0 on others) if ``trees`` asks for it. Objects: ``transcript`` (the conversation of the episode), ``invalid`` (why
    it is invalid, or ""), ``episode_metrics`` (numbers by name).
    """
    shared = torch.tensor([sum(len(segment.tokens) for segment in row.segments[: row.shared]) for row in rows])
    valid = torch.tensor([not row.trajectory.invalid or trees.error_score is not None for row in rows])
    lengths = batch.lengths
    in_loss = valid.repeat_interleave(lengths)
    if trees.shared_tokens == "once":
        in_loss &= token_places(lengths) >= shared.repeat_interleave(lengths)
    columns = {
        "loss_mask": batch.jagged(batch.flat("loss_mask") * in_loss),
        "trajectory": torch.tensor([sample.position * EPISODES + row.number for row in rows]),
        "shared_prefix": shared,
        "episode_score": torch.tensor([_score(row.trajectory, trees) for row in rows], dtype=torch.float32),
        "valid": valid,
        "step_rewards": batch.jagged(torch.cat([_turn_rewards(row) for row in rows])),
        "transcript": [row.trajectory.messages for row in rows],
        "invalid": [row.trajectory.invalid for row in rows],
        "episode_metrics": [row.trajectory.metrics for row in rows],
    }
    if trees.turn_state:
        columns["turn_state"] = batch.jagged(torch.cat([_turn_states(row) for row in rows]))
    return columns


def _rows(sample: PromptSample, trajectories: Sequence[Trajectory]) -> Iterator[_Row]:
    """Yield the rows of every trajectory, in the order of its leaves."""
    for number, trajectory in enumerate(trajectories):
        if not trajectory.segments:
            trajectory = replace(trajectory, segments=(Segment(sample.prompt_tokens),))
        seen: set[int] = set()
        for path in trajectory.rows():
            shared = len(seen.intersection(path))  # what an earlier row has is the beginning of the path
            seen.update(path)
            yield _Row(number, trajectory, tuple(trajectory.segments[index] for index in path), shared)


def _check_single(sample: PromptSample, rows: Sequence[_Row]) -> None:
    """Raise an error if a trajectory needs what a batch of single rows cannot say."""
    if len({row.number for row in rows}) < len(rows) or any(row.trajectory.invalid for row in rows):
        raise EngineError(
            f"an episode of prompt {sample.position} branches or is invalid, and the run's batches have one row for "
            "each episode: such episodes come from an environment (rollout.environment)"
        )


def _score(trajectory: Trajectory, trees: TreeRows) -> float:
    """Return the score that the episode gives, or has because it failed; NaN without one."""
    score = trees.error_score if trajectory.invalid else trajectory.score
    return math.nan if score is None else score


def _turn_rewards(row: _Row) -> torch.Tensor:
    """Return the rewards of the turns that no earlier row has, ``[t]`` fp32; a failed episode has none."""
    rewards = torch.zeros(row.length)
    if row.length and not row.trajectory.invalid:
        for segment, end in list(zip(row.segments, row.ends))[row.shared :]:
            rewards[max(end - 1, 0)] += segment.reward or 0.0
    return rewards


def _turn_states(row: _Row) -> torch.Tensor:
    """Return ``turn_state`` of a row, ``[t]`` int64: of the state that the turn names, or else of all tokens before."""
    states = torch.zeros(row.length, dtype=torch.int64)
    known = hashlib.blake2b(digest_size=8)
    for segment, end in zip(row.segments, row.ends):
        if segment.sampled:
            of = known if segment.state is None else hashlib.blake2b(segment.state.encode(), digest_size=8)
            states[end - len(segment.tokens) : end] = int.from_bytes(of.digest(), "big", signed=True)
        known.update(array("q", segment.tokens).tobytes())
    return states


def _logprobs(tokens: Jagged, rows: Sequence[_Row], sampled: torch.Tensor, trees: TreeRows | None) -> dict[str, Jagged]:
    """Return the column ``rollout_logprobs``, if all sampled segments have them or ``trees`` say so."""
    segments = [(row.trajectory, segment) for row in rows for segment in row.segments if segment.sampled]
    missing = [trajectory for trajectory, segment in segments if segment.logprobs is None]
    if missing if trees is None else not trees.logprobs:
        return {}
    if not all(trajectory.invalid for trajectory in missing):
        raise EngineError(
            "an episode has sampled tokens without log-probs, which this run needs: its environment must ask for them "
            "(EpisodeSpec.sampling.logprobs), and keep them in Segment.logprobs"
        )
    values = torch.zeros(len(tokens.values))
    found = [[0.0] * len(segment.tokens) if segment.logprobs is None else segment.logprobs for _, segment in segments]
    values[sampled] = torch.tensor(list(chain.from_iterable(found)))
    return {"rollout_logprobs": tokens.with_values(values)}


def _versions(segments: Sequence[Segment]) -> torch.Tensor:
    """Return the version that made each sampled token, ``[sampled tokens]`` int32; 0 from an engine that says none."""
    sampled = [segment for segment in segments if segment.sampled]
    spans = [span for segment in sampled for span in segment.versions or [(0, len(segment.tokens))]]
    versions, counts = (
        (torch.tensor(part, dtype=torch.int64) for part in zip(*spans)) if spans else ((torch.zeros(0),) * 2)
    )
    return versions.int().repeat_interleave(counts.long())
