"""Generate and score completions of one model for all prompts, from where an earlier evaluation stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from rlcore.batch import Batch
from rlcore.engines import ModelSettings, RolloutEngine
from rlcore_recipes.data.end_tokens import missing_ends, model_tokens
from rlcore_recipes.data.prompts import PromptDataset, load_prompts
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.evaluation.results import Answer, Header, Record, ResultsFile, keys_of
from rlcore_recipes.generation.candidates import Candidate
from rlcore_recipes.generation.engines import rollout_engine
from rlcore_recipes.rollouts.environment import check_environment
from rlcore_recipes.rollouts.episode import Episode, single_completion
from rlcore_recipes.rollouts.plan import RolloutPlan, environment_episode, tree_rows
from rlcore_recipes.rollouts.sampling import validation_sampling
from rlcore_recipes.rollouts.scorer import Scorer, build_scorer
from rlcore_recipes.rollouts.synchronous import roll_out_together
from rlcore_recipes.rollouts.trees import first_rows
from rlcore_recipes.rollouts.workers import RolloutWorkers
from rlcore_recipes.run.preflight import check_ground_truth, check_sources
from rlcore_recipes.run.roles import closed, open_executor
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.settings.evaluation import EvalConfig

Progress = Callable[[int, int], None]
"""Takes how many prompts are done, and of how many."""


def evaluate(config: EvalConfig, candidate: Candidate, out: Path, progress: Progress) -> list[Record]:
    """Return the records of all prompts, of which those in ``out`` are not generated again.

    Sampling, seeds and scores are those of a run's validation (`rlcore_recipes.step.validation`).

    Raises:
        RlcoreError: something in the input is missing or broken, or ``out`` holds results of something else.
    """
    with candidate.folder() as folder:
        model = config.model.model_copy(update={"path": folder, "tokenizer_path": _tokenizer(config, candidate)})
        check_sources(model, config.data.val_files)
        tokenizer = load_tokenizer(model)
        size, model_ends = model_tokens(model)
        prompts = load_prompts(config.data, config.data.val_files, tokenizer, config.data.val_limit, size)
        check_ground_truth(config.reward, prompts)
        stop_tokens = missing_ends(model, tokenizer, prompts.ends)
        keys = keys_of(prompts)
        header = Header(source=candidate.source, weights=candidate.fingerprint(), prompts=fingerprint(prompts))
        results = ResultsFile(out / candidate.file, header)
        missing = [number for number, key in enumerate(keys) if key not in results.records]
        progress(len(keys) - len(missing), len(keys))
        if missing:
            plan = _plan(config, model, stop_tokens, model_ends.union(stop_tokens))
            check_environment(plan.episode)
            with ExitStack() as stack:
                workers = _workers(config, model, model_ends.union(stop_tokens), out, stack)
                for start in range(0, len(missing), config.data.val_batch_size):
                    chosen = missing[start : start + config.data.val_batch_size]
                    made = roll_out_together(workers, plan, [prompts[number] for number in chosen])
                    scores = made.scores.result()
                    batch = made.batch.with_columns(**{name: scores[name] for name in scores.names})
                    named = [keys[number] for number in chosen]
                    results.append(workers.executor.compute(records, batch, named, plan.n))
                    progress(len(results.records), len(keys))
        return list(results.in_order(keys))


def _tokenizer(config: EvalConfig, candidate: Candidate) -> str | None:
    """Return the tokenizer that the configuration names, for the model that it names."""
    return config.model.tokenizer_path if candidate.model == config.model.path else None


def _plan(config: EvalConfig, model: ModelSettings, stop_tokens: tuple[int, ...], ends: frozenset[int]) -> RolloutPlan:
    sampling = validation_sampling(config.rollout, config.data.max_response_length, stop_tokens)
    episode: Episode = partial(single_completion, sampling=sampling)
    if config.rollout.environment is not None:
        episode = environment_episode(config, model, sampling, ends, "validation")
    trees = tree_rows(config.rollout.environment)
    return RolloutPlan(episode, config.rollout.validation.n, config.seed, "validation", trees=trees)


def _workers(
    config: EvalConfig, model: ModelSettings, ends: frozenset[int], out: Path, stack: ExitStack
) -> RolloutWorkers:
    """Build the engines; ``stack`` closes them."""
    executor = open_executor(config.controller, config.roles, out, stack)

    def built(role: str, interface: Any, factory: Callable[..., Any]) -> Any:
        group = executor.build(role, interface, factory)
        stack.callback(closed, group)
        return group

    reward = built("reward", Scorer, partial(build_scorer, config.reward, model, ends))
    factory = partial(rollout_engine, model, config.rollout, config.data.longest_sequence, config.seed)
    rollout = built("rollout", RolloutEngine, factory)
    return RolloutWorkers(executor, rollout, reward, None, Timings(executor), config.rollout.free_memory)


def fingerprint(prompts: PromptDataset) -> str:
    """Return a hash of the prompts' rows and tokens."""
    tokens = sha256(repr([sample.prompt_tokens for sample in prompts]).encode()).hexdigest()[:32]
    return "-".join([tokens, *prompts.fingerprints])


def records(batch: Batch, keys: Sequence[str], n: int) -> list[Record]:
    """Return the records of scored samples that were rolled out together, ``n`` trajectories of each in order."""
    batch = batch.filter(first_rows(batch))
    earned = batch["score"].tolist() if "step_rewards" in batch else [result.score for result in batch["reward_result"]]
    lengths: torch.Tensor = batch["response_length"]
    answers = [
        Answer(
            text=text,
            tokens=tokens,
            finish_reason=reason,
            score=score,
            answer=result.answer,
            extras=dict(result.extras),
            error=result.error,
        )
        for text, tokens, reason, score, result in zip(
            batch["completion"], lengths.tolist(), batch["finish_reason"], earned, batch["reward_result"], strict=True
        )
    ]
    return [
        Record(
            key=key,
            data_source=batch["data_source"][first],
            prompt=batch["messages"][first],
            ground_truth=batch["ground_truth"][first],
            answers=answers[first : first + n],
        )
        for key, first in zip(keys, range(0, len(answers), n), strict=True)
    ]
