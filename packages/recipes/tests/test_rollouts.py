"""Prompts to requests to trajectories."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlcore.batch import Batch
from rlcore.engines import Completion, GenerationRequest, RewardResult, RolloutEngine, SamplingParams, WeightBucket
from rlcore_recipes.collect import refill
from rlcore_recipes.data.prompts import PromptSample
from rlcore_recipes.randomness import sample_seed
from rlcore_recipes.rollouts import SamplingJob, generate, greedy, sample_together, trajectories
from rlcore_recipes.scoring import score


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


def test_trajectories_align_tokens_masks_and_logprobs() -> None:
    completions = [
        Completion([7, 8], [-0.1, -0.2], "stop", [(4, 1), (5, 1)]),
        Completion([9], [-0.3], "length", [(5, 1)]),
        Completion([], [], "abort"),
        Completion([6], [-0.4], "stop"),
    ]
    versions = [[-1, -1, -1, 4, 5], [-1, -1, -1, 5], [-1], [-1, 0]]
    batch = trajectories([prompt(20, [1, 2, 3]), prompt(21, [4])], completions, n=2)
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
    batch = trajectories([prompt(0, [5, 5])], [completion], n=1)
    assert batch["token_version"].to_list()[0].tolist() == [-1, -1, 7, 7, 8, 8, 8, 9]
    assert batch["policy_version"].tolist() == [7]
    assert batch["later_version_tokens"].tolist() == [4]


def test_trajectories_of_nothing() -> None:
    batch = trajectories([], [], n=4)
    assert len(batch) == 0
    assert len(batch.flat("token_version")) == 0


def test_parts_of_validation_have_the_same_columns_however_small() -> None:
    """A rank without prompts adds nothing, and a completion of no tokens brings no log-probs that none asked for."""
    sampling = greedy(SamplingParams(max_tokens=8))
    empty = trajectories([prompt(0, [1])], [Completion([], [], "abort", [], "")], n=1, logprobs=sampling.logprobs)
    jobs = [SamplingJob(prompt(1, [1]), sampling, n=1, seed=0)]
    parts = [part for given in (jobs, []) for _, part in sample_together(Echo(), given)]
    assert "rollout_logprobs" not in parts[0]
    assert len(Batch.concat([empty, *parts])) == 2


def test_a_sample_does_not_depend_on_what_runs_beside_it() -> None:
    sampling = SamplingParams(max_tokens=8)
    prompts = [prompt(position, [position]) for position in range(6)]
    together = generate(Echo(), prompts, sampling, n=3, seed=5)
    alone = generate(Echo(), prompts[4:5], sampling, n=3, seed=5)
    assert together.slice(12, 15).equals(alone)
    other = generate(Echo(), prompts, sampling, n=3, seed=6)
    assert not together.select("tokens").equals(other.select("tokens"))


def test_requests_of_a_prompt_share_its_group_and_have_their_own_seeds() -> None:
    engine = Echo()
    generate(engine, [prompt(8, [1]), prompt(9, [1])], SamplingParams(max_tokens=8), n=4, seed=0)
    assert [request.group for request in engine.requests] == [8] * 4 + [9] * 4
    assert len({request.sampling.seed for request in engine.requests}) == 8
    assert len({request.request_id for request in engine.requests}) == 8


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
    completions = [Completion([2, 0], [0.0, 0.0], "stop"), Completion([3, 4], [0.0, 0.0], "length")]
    batch = trajectories([prompt(0, [1]), prompt(1, [1, 1])], completions, n=1)
    reward = ByText()
    scored = score(reward, Letters(), batch)  # type: ignore[arg-type]
    assert [sample.completion for sample in reward.seen] == ["c", "de"]
    assert [sample.finish_reason for sample in reward.seen] == ["stop", "length"]
    assert [sample.ground_truth for sample in reward.seen] == ["truth 0", "truth 1"]
    assert scored["score"].tolist() == [1.0, 2.0]


# --- dynamic sampling ---------------------------------------------------------------------------------------------


def sampled(positions: Sequence[int], n: int, passing: set[int]) -> Batch:
    return Batch(
        {
            "group": torch.tensor([position for position in positions for _ in range(n)]),
            "score": torch.tensor([float(p in passing and s == 0) for p in positions for s in range(n)]),
        }
    )


def session(wanted: int, n: int) -> Any:
    stream = ([prompt(position, [1])] for position in range(1000))
    return SimpleNamespace(
        prompts=stream,
        config=SimpleNamespace(data=SimpleNamespace(train_batch_size=wanted), rollout=SimpleNamespace(n=n)),
    )


def spread(scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    with_spread = {int(g) for g in group.unique() if len(scores[group == g].unique()) > 1}
    return torch.tensor([int(g) in with_spread for g in group])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Positions of the prompts that each round generated for; every third prompt passes."""
    rounds: list[list[int]] = []

    def fake(session: Any, prompts: Sequence[PromptSample]) -> Batch:
        rounds.append([sample.position for sample in prompts])
        return sampled(rounds[-1], session.config.rollout.n, set(range(0, 1000, 3)))

    monkeypatch.setattr("rlcore_recipes.collect.generate_and_score", fake)
    return rounds


def test_refill_goes_on_until_the_batch_is_full(drawn: list[list[int]]) -> None:
    batch, metrics = refill(session(wanted=4, n=2), spread, max_generations=10)  # type: ignore[arg-type]
    assert batch["group"].tolist() == [0, 0, 3, 3, 6, 6, 9, 9]
    # 2 of the first 4 pass, so 4 more are likely to give the 2 that are missing; 1 of them does
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert metrics["dynamic_sampling/rounds"] == 3
    assert metrics["dynamic_sampling/groups"] == 11
    assert metrics["dynamic_sampling/passed"] == pytest.approx(4 / 11)
    assert metrics["dynamic_sampling/unfilled"] == 0


def test_refill_gives_up_and_fills_with_what_did_not_pass(drawn: list[list[int]]) -> None:
    batch, metrics = refill(session(wanted=4, n=2), spread, max_generations=1)  # type: ignore[arg-type]
    assert batch["group"].tolist() == [0, 0, 3, 3, 1, 1, 2, 2]
    assert metrics["dynamic_sampling/unfilled"] == 0.5
    assert len(drawn) == 1
