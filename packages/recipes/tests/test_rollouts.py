"""From prompts to trajectories to scored groups."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from rlcore.batch import Batch
from rlcore.controller import LocalExecutor
from rlcore.engines import Completion, GenerationRequest, RewardResult, RolloutEngine, SamplingParams, WeightBucket
from rlcore.engines.episode import PromptSample, Segment, Trajectory, sampled_segment
from rlcore_recipes.rollouts.episode import single_completion
from rlcore_recipes.rollouts.group_job import GroupJob, run_groups
from rlcore_recipes.rollouts.plan import RolloutPlan
from rlcore_recipes.rollouts.sampling import greedy
from rlcore_recipes.rollouts.scorer import Scorer
from rlcore_recipes.rollouts.source import Rollouts
from rlcore_recipes.rollouts.synchronous import SynchronousGroups, roll_out_together
from rlcore_recipes.rollouts.trajectories import group_batch
from rlcore_recipes.rollouts.workers import RolloutWorkers
from rlcore_recipes.run.seeds import sample_seed
from rlcore_recipes.run.timing import Timings


class Echo(RolloutEngine):
    """Completes a prompt with tokens that its seed determines."""

    version = 3

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> Completion:
        await asyncio.sleep(0)
        self.requests.append(request)
        assert request.sampling.seed is not None
        tokens = [10 + request.sampling.seed % 5] * (1 + request.sampling.seed % 3)
        return Completion(tokens, [-0.5] * len(tokens), "stop", [(self.version, len(tokens))], request.request_id)

    def update_weights(self, buckets: Iterable[WeightBucket], version: int) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def abort(self, request_ids: Sequence[str] | None = None) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


def prompt(position: int, tokens: list[int]) -> PromptSample:
    return PromptSample(tokens, [{"role": "user", "content": "?"}], f"truth {position}", "set", position=position)


def group(sample: PromptSample, completions: Sequence[Completion], logprobs: bool = True) -> Batch:
    """A batch of single completions of ``sample``."""
    prompt = Segment(sample.prompt_tokens)
    trajectories = [Trajectory((prompt, sampled_segment(c, logprobs)), c.finish_reason) for c in completions]
    return group_batch(sample, trajectories)


def test_trajectories_align_tokens_masks_and_logprobs() -> None:
    first = [
        Completion([7, 8], [-0.1, -0.2], "stop", [(4, 1), (5, 1)]),
        Completion([9], [-0.3], "length", [(5, 1)]),
    ]
    second = [Completion([], [], "abort"), Completion([6], [-0.4], "stop")]
    versions = [[-1, -1, -1, 4, 5], [-1, -1, -1, 5], [-1], [-1, 0]]
    batch = Batch.concat([group(prompt(20, [1, 2, 3]), first), group(prompt(21, [4]), second)])
    assert [row.tolist() for row in batch["tokens"].to_list()] == [[1, 2, 3, 7, 8], [1, 2, 3, 9], [4], [4, 6]]
    assert [row.tolist() for row in batch["loss_mask"].to_list()] == [[0, 0, 0, 1, 1], [0, 0, 0, 1], [0], [0, 1]]
    expected = torch.tensor([0, 0, 0, -0.1, -0.2, 0, 0, 0, -0.3, 0, 0, -0.4])
    assert torch.equal(batch.flat("rollout_logprobs"), expected)
    assert batch["group"].tolist() == [20, 20, 21, 21]
    assert batch["prompt_length"].tolist() == [3, 3, 1, 1]
    assert batch["response_length"].tolist() == [2, 1, 0, 1]
    assert batch["policy_version"].tolist() == [4, 5, 0, 0]
    assert [row.tolist() for row in batch["token_version"].to_list()] == versions
    assert batch["token_version"].values.dtype == torch.int32
    assert batch["later_version_tokens"].tolist() == [1, 0, 0, 0]
    assert batch["finish_reason"] == ["stop", "length", "abort", "stop"]
    assert batch["ground_truth"] == ["truth 20", "truth 20", "truth 21", "truth 21"]


def test_every_token_knows_its_version() -> None:
    completion = Completion([1, 2, 3, 4, 5, 6], [0.0] * 6, "length", [(7, 2), (8, 3), (9, 1)])
    batch = group(prompt(0, [5, 5]), [completion])
    assert batch["token_version"].to_list()[0].tolist() == [-1, -1, 7, 7, 8, 8, 8, 9]
    assert batch["policy_version"].tolist() == [7]
    assert batch["later_version_tokens"].tolist() == [4]


def test_tokens_that_the_policy_did_not_sample_are_masked_wherever_they_are() -> None:
    turns = (
        Segment([1, 2]),
        Segment([3, 4], True, [-0.1, -0.2], [(6, 2)]),
        Segment([5]),  # a tool's answer
        Segment([6], True, [-0.3], [(7, 1)]),
    )
    batch = group_batch(prompt(0, [1, 2]), [Trajectory(turns, "stop")])
    assert batch.flat("tokens").tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.flat("loss_mask").tolist() == [0, 0, 1, 1, 0, 1]
    assert batch.flat("rollout_logprobs").tolist() == pytest.approx([0, 0, -0.1, -0.2, 0, -0.3])
    assert batch.flat("token_version").tolist() == [-1, -1, 6, 6, -1, 7]
    assert (batch["prompt_length"].item(), batch["response_length"].item()) == (2, 3)
    assert (batch["policy_version"].item(), batch["later_version_tokens"].item()) == (6, 1)


def completions(positions: Iterable[int], sampling: SamplingParams, n: int = 3, seed: int = 5) -> list[GroupJob]:
    episode = partial(single_completion, sampling=sampling)
    return [GroupJob(prompt(position, [position]), episode, n, seed, "train") for position in positions]


def test_parts_of_validation_have_the_same_columns_however_small() -> None:
    """A completion of no tokens brings no log-probs that the request did not ask for."""
    sampling = greedy(SamplingParams(max_tokens=8))
    empty = group(prompt(0, [1]), [Completion([], [], "abort", [], "")], logprobs=sampling.logprobs)
    parts = [part for _, part in run_groups(Echo(), completions([1], sampling, n=1))]
    assert "rollout_logprobs" not in parts[0]
    assert len(Batch.concat([empty, *parts])) == 2
    assert list(run_groups(Echo(), [])) == []


def test_a_sample_does_not_depend_on_what_runs_at_the_same_time() -> None:
    sampling = SamplingParams(max_tokens=8)

    def tokens(positions: Iterable[int], seed: int) -> dict[int, Batch]:
        return {
            part["group"][0].item(): part for _, part in run_groups(Echo(), completions(positions, sampling, 3, seed))
        }

    together, alone = tokens(range(6), seed=5), tokens([4], seed=5)
    assert together[4].equals(alone[4])
    assert not together[4].select("tokens").equals(tokens([4], seed=6)[4].select("tokens"))


def test_requests_of_a_prompt_share_its_group_and_have_their_own_seeds() -> None:
    engine = Echo()
    list(run_groups(engine, completions([8, 9], SamplingParams(max_tokens=8), n=4)))
    assert [request.group for request in engine.requests] == [8] * 4 + [9] * 4
    assert len({request.sampling.seed for request in engine.requests}) == 8
    assert len({request.request_id for request in engine.requests}) == 8


def test_a_caller_that_stops_early_cancels_what_is_unfinished() -> None:
    class Slow(Echo):
        cancelled = 0

        async def generate(self, request: GenerationRequest) -> Completion:
            try:
                await asyncio.sleep(0 if request.group == 0 else 60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return await super().generate(request)

    engine = Slow()
    answers = run_groups(engine, completions([0, 1], SamplingParams(max_tokens=8), n=2))
    assert next(answers)[0] == [0]
    answers.close()  # type: ignore[attr-defined]
    assert engine.cancelled == 2


def test_seeds_differ_by_everything_they_are_made_of() -> None:
    seeds = {
        sample_seed(seed, purpose, position, sample)
        for seed in range(3)
        for purpose in ("train", "validation")
        for position in range(12)
        for sample in range(12)
    }
    assert len(seeds) == 3 * 2 * 12 * 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, "train", 1, 2) == sample_seed(0, "train", 1, 2)


def test_greedy_keeps_limits_and_stops() -> None:
    sampling = greedy(SamplingParams(max_tokens=9, temperature=0.7, top_k=5, top_p=0.9, stop=("x",)))
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 0, 1.0)
    assert (sampling.max_tokens, sampling.stop) == (9, ("x",))


class ByText:
    """Scores a completion by its text."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def score_batch(self, samples: Sequence[Any]) -> list[RewardResult]:
        self.seen += samples
        return [RewardResult(float(len(sample.completion))) for sample in samples]


class Letters:
    """A tokenizer of one letter per token; 0 is special."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(97 + token) for token in row if token) for row in rows]


def test_rewards_see_the_completion_without_prompt_and_special_tokens() -> None:
    batch = Batch.concat(
        [
            group(prompt(0, [1]), [Completion([2, 0], [0.0, 0.0], "stop")]),
            group(prompt(1, [1, 1]), [Completion([3, 4], [0.0, 0.0], "length")]),
        ]
    )
    reward = ByText()
    scored = Scorer(reward, Letters()).score(batch)  # type: ignore[arg-type]
    assert [sample.completion for sample in reward.seen] == ["c", "de"]
    assert [sample.finish_reason for sample in reward.seen] == ["stop", "length"]
    assert [sample.ground_truth for sample in reward.seen] == ["truth 0", "truth 1"]
    assert scored["score"].tolist() == [1.0, 2.0]


# --- rounds, and dynamic sampling -----------------------------------------------------------------------------------


class ByPosition:
    """Scores the samples of a prompt differently if its position is a multiple of three, and alike otherwise."""

    def __init__(self) -> None:
        self.scored: list[list[int]] = []

    def score(self, batch: Batch) -> Batch:
        self.scored.append(batch["group"].tolist())
        passes = batch["group"] % 3 == 0
        first = torch.cat([torch.tensor([True]), batch["group"].diff() != 0])
        return Batch({"score": (passes & first).float()})


class Prompts:
    """A loader of one prompt at a time."""

    batch_size = 1

    def __init__(self) -> None:
        self.drawn = 0

    def __next__(self) -> list[PromptSample]:
        self.drawn += 1
        return [prompt(self.drawn - 1, [1])]


def workers(scorer: Any, engine: Echo) -> RolloutWorkers:
    executor = LocalExecutor()
    return RolloutWorkers(
        executor, executor.workers(RolloutEngine, engine), executor.workers(ByPosition, scorer), None, Timings(), False
    )


SAMPLING = SamplingParams(max_tokens=8)


def spread(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    with_spread = {int(g) for g in group.unique() if len(scores[group == g].unique()) > 1}
    return torch.tensor([int(g) in with_spread for g in group])


def dynamic(scorer: ByPosition, engine: Echo, max_rounds: int) -> Rollouts:
    plan = RolloutPlan(partial(single_completion, sampling=SAMPLING), n=2, seed=0, keep=spread)  # type: ignore[arg-type]
    groups = SynchronousGroups(workers(scorer, engine), Prompts(), plan, 4, max_rounds)  # type: ignore[arg-type]
    return groups.take(1)


def test_dynamic_sampling_goes_on_until_the_batch_is_full() -> None:
    scorer = ByPosition()
    samples = dynamic(scorer, Echo(), max_rounds=10)
    assert samples.batch["group"].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]
    assert samples.scores.result()["score"].tolist() == [1, 0] * 4
    # 2 of the first 4 pass, so 4 more are likely to give the 2 that are missing; 1 of them does
    assert [groups[::2] for groups in scorer.scored] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert samples.metrics["dynamic_sampling/rounds"] == 3
    assert samples.metrics["dynamic_sampling/groups"] == 11
    assert samples.metrics["dynamic_sampling/passed"] == pytest.approx(4 / 11)
    assert samples.metrics["dynamic_sampling/unfilled"] == 0


def test_dynamic_sampling_fills_the_batch_with_dropped_groups_after_its_last_round() -> None:
    samples = dynamic(ByPosition(), Echo(), max_rounds=1)
    assert samples.batch["group"].tolist() == [0, 0, 3, 3, 1, 1, 2, 2]
    assert samples.metrics["dynamic_sampling/unfilled"] == 0.5
    assert samples.metrics["dynamic_sampling/rounds"] == 1


def test_a_round_makes_one_call_for_all_episodes_and_one_for_all_scores() -> None:
    scorer, engine = ByPosition(), Echo()
    episode = partial(single_completion, sampling=SAMPLING)
    plan = RolloutPlan(episode, n=2, seed=0, baseline=partial(single_completion, sampling=greedy(SAMPLING)))
    samples = roll_out_together(workers(scorer, engine), plan, [prompt(position, [1]) for position in range(3)])
    temperatures = [request.sampling.temperature for request in engine.requests]
    assert temperatures == [1.0] * 6 + [0.0] * 3, "baselines after all others, before the step goes on"
    assert scorer.scored == [], "scores are computed when they are asked for"
    scores = samples.scores.result()
    assert scorer.scored == [[0, 0, 1, 1, 2, 2], [0, 1, 2]]
    assert scores["score"].tolist() == [1, 0, 0, 0, 0, 0]
    assert scores["baseline_score"].tolist() == [1, 1, 0, 0, 0, 0]
    assert samples.batch["group"].tolist() == [0, 0, 1, 1, 2, 2]
