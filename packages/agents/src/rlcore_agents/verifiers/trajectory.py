"""Episodes of verifiers as trajectories.

A trace of verifiers is a graph of messages: every node has the tokens that its message adds, so that the tokens of a
path from a root are exactly what the model saw and sampled. Whether the policy sampled a node's tokens, with which
log-probs and weights, is what the rollout engine says: it made these tokens after the tokens of the path before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rlcore.engines.episode import Segment, Trajectory, sampled_segment
from rlcore.engines.rollout import Completion
from rlcore_agents.conversation.segments import SegmentTree

if TYPE_CHECKING:
    from verifiers.v1 import Episode, Trace

Completions = Mapping[tuple[tuple[int, ...], tuple[int, ...]], Completion]
"""Completions by the tokens of prompt and completion."""


@dataclass(frozen=True)
class Run:
    """An agent's run in a tree of segments.

    Attributes:
        turns: completions in it.
        ends: nodes of the tree at the ends of the run's conversations.
        last: the completion of the last turn.
    """

    trace: Trace
    turns: int
    ends: frozenset[int]
    last: Completion

    @property
    def reward(self) -> float | None:
        """Weighted sum of the run's rewards; None if it has none."""
        rewards = [reward.value for reward in self.trace.rewards.values() if reward is not None]
        return sum(rewards) if rewards else None

    def messages(self, named: bool) -> list[dict[str, Any]]:
        """Return the messages of the last conversation; ``named`` adds who the agent is."""
        from verifiers.v1.dialects.chat import message_to_wire

        agent = {"agent": self.trace.agent.name} if named else {}
        return [{**message_to_wire(message), **agent} for message in self.trace.messages]


def trajectory_of(episode: Episode, completions: Completions, prompt: Sequence[int], *, complete: bool) -> Trajectory:
    """Return the trajectory of ``episode``: a tree of the runs of all agents that are trained.

    The reward of a single agent is the score of the trajectory. Several agents may have different rewards: each gets
    its own as the reward of the last turn of its conversations, and the score is 0.

    Args:
        completions: of the rollout engine in this episode.
        prompt: tokens of a trajectory in which the policy sampled nothing.
        complete: whether the environment takes the episode for a valid result.
    """
    tree = SegmentTree()
    traces = [trace for trace in episode.traces if trace.agent.trainable]
    runs = [run for trace in traces if (run := _add(tree, trace, completions)) is not None]
    invalid = "" if complete else _reason(episode)
    if not runs:
        invalid = invalid or "no agent that is trained got a completion"
        return Trajectory((Segment(prompt),), "abort", invalid=invalid, info=_info(traces))
    score = None if all(run.reward is None for run in runs) else 0.0
    if len(runs) == 1:
        score = runs[0].reward
    for run in runs if len(runs) > 1 else ():
        for end in run.ends:
            tree.reward(end, run.reward or 0.0)
    return Trajectory(
        tree.ordered(),
        runs[-1].last.finish_reason,
        info=_info(traces),
        score=None if invalid else score,
        invalid=invalid,
        messages=[message for run in runs for message in run.messages(named=len(runs) > 1)],
        metrics=_metrics(runs),
    )


def _add(tree: SegmentTree, trace: Trace, completions: Completions) -> Run | None:
    """Add an agent's run to ``tree``; None if the policy made nothing of it.

    Attempts of compaction that the agent did not go on from are no branch to train.
    """
    nodes: dict[int, int] = {}
    made: list[tuple[int, Completion]] = []
    before: set[int | None] = set()
    ends: set[int | None] = set()
    positions = {id(node): position for position, node in enumerate(trace.nodes)}
    for branch in trace.branches:
        tokens: list[int] = []
        end: int | None = None
        for node in branch.nodes if branch.trainable else ():
            tokens.extend(node.token_ids)
            start = len(tokens) - sum(node.mask)
            completion = completions.get((tuple(tokens[:start]), tuple(tokens[start:]))) if any(node.mask) else None
            if completion is None:
                continue
            position = positions[id(node)]
            if position not in nodes:
                nodes[position] = tree.add(tokens[:start], sampled_segment(completion, True), end)
                made.append((position, completion))
            before.add(end)
            end = nodes[position]
        ends.add(end)
    if not made:
        return None
    _, last = max(made, key=lambda each: each[0])
    return Run(trace, len(made), frozenset(end for end in ends - before if end is not None), last)


def _reason(episode: Episode) -> str:
    """Return why the episode is no valid result, as a sentence."""
    for trace in episode.traces:
        if not trace.ok:
            error = trace.last_error
            what = f"{error.type}: {error.message}" if error else f"it stopped: {trace.stop_condition}"
            return f"agent {trace.agent.name!r} of {episode.env.id} failed in task {trace.task.data.idx}: {_line(what)}"
    error = episode.errors[-1] if episode.errors else None
    what = f"{error.type}: {error.message}" if error else "the environment rejects the result"
    return f"{episode.env.id} failed in task {episode.task.data.idx}: {_line(what)}"


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{lines[0]} … {lines[-1]}" if len(lines) > 1 else "".join(lines)


def _info(traces: Sequence[Trace]) -> dict[str, Any]:
    """Return how the runs ended, and what the environment noted about them."""
    noted = [{"agent": trace.agent.name, **trace.info} for trace in traces if trace.info]
    stopped = ", ".join(trace.stop_condition or "" for trace in traces)
    return {"stop_condition": stopped, **({"trace_info": noted} if noted else {})}


def _metrics(runs: Sequence[Run]) -> dict[str, float]:
    """Return metrics of the episode, and of its runs; names of several agents' runs begin with the agent's."""
    agents = {run.trace.agent.name for run in runs}
    found: dict[str, list[float]] = {}
    for run in runs:
        agent = f"{run.trace.agent.name}/" if len(agents) > 1 else ""
        rewards = {f"reward/{name}": reward and reward.value for name, reward in run.trace.rewards.items()}
        for name, value in {**run.trace.metrics, **rewards}.items():
            if value is not None:
                found.setdefault(f"{agent}{name}", []).append(float(value))
    return {
        "turns": float(sum(run.turns for run in runs)),
        "tool_calls": float(sum(len(run.trace.tool_messages) for run in runs)),
        "harness_seconds": sum(run.trace.timing.agent.harness.duration for run in runs),
        **{name: fmean(values) for name, values in found.items()},
    }
