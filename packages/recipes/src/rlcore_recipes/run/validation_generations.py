"""Completions in the validation of supervised fine-tuning: what the model says to held-out prompts, scored."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlcore import plugins
from rlcore.engines import (
    ModelSettings,
    Reward,
    RewardResult,
    RewardSample,
    RolloutEngine,
    RolloutSpec,
    SamplingParams,
    WeightSyncSettings,
)
from rlcore.engines.episode import PromptSample
from rlcore.engines.settings import adapter_rank
from rlcore_recipes.data.arrow_data import is_tokenized
from rlcore_recipes.data.columns import names_in
from rlcore_recipes.data.files import open_file
from rlcore_recipes.data.layouts import every_column
from rlcore_recipes.data.prompts import load_prompts
from rlcore_recipes.data.settings import DataFiles, DataSettings
from rlcore_recipes.data.sft_sample import SFTSample
from rlcore_recipes.data.template_variables import RENDERED
from rlcore_recipes.data.tokenizer import load_tokenizer
from rlcore_recipes.rollouts.episode import single_completion
from rlcore_recipes.rollouts.plan import RolloutPlan
from rlcore_recipes.rollouts.scorer import Scorer, build_scorer
from rlcore_recipes.rollouts.source import joined
from rlcore_recipes.rollouts.synchronous import roll_out_together
from rlcore_recipes.rollouts.workers import RolloutWorkers
from rlcore_recipes.run.dataset_session import DatasetSession
from rlcore_recipes.run.roles import closed
from rlcore_recipes.run.trainable import Validation
from rlcore_recipes.settings.supervised import SFTConfig
from rlcore_recipes.step.logged_rows import BATCH_COLUMNS, with_prompts
from rlcore_recipes.step.validation import LOGGED_ORDER_SEED, metrics_and_table


@dataclass(frozen=True)
class Generation:
    """What generates and scores completions of held-out prompts."""

    prompts: Sequence[PromptSample]
    workers: RolloutWorkers
    plan: RolloutPlan


class EqualsReference(Reward):
    """1 for the reference answer itself, white space around it aside; 0 for anything else."""

    async def score(self, sample: RewardSample) -> RewardResult:
        return RewardResult(float(sample.completion.strip() == sample.ground_truth))


def equals_reference(model: ModelSettings, engines: Mapping[str, Any]) -> Scorer:
    """Build the scorer of runs without a reward."""
    return Scorer(EqualsReference(), load_tokenizer(model))


def open_generation(session: DatasetSession[SFTConfig], prompts: Sequence[PromptSample]) -> Generation:
    """Build the engines that generate and score; the session closes them."""
    config, executor, stack = session.config, session.executor, session.stack
    rollout, reward = config.rollout, config.reward
    scorer = partial(equals_reference, config.model)
    if reward is not None:
        scorer = partial(build_scorer, reward, config.model, session.end_tokens)
    scoring: Any = executor.build("reward", Scorer, scorer)
    stack.callback(closed, scoring)
    longest = max(len(prompt.prompt_tokens) for prompt in prompts) + rollout.max_response_length
    factory = partial(_rollout, config, longest)
    engine: RolloutEngine = executor.build("rollout", RolloutEngine, factory)  # type: ignore[type-abstract]
    stack.callback(closed, engine)
    sampling = SamplingParams(
        max_tokens=rollout.max_response_length,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        logprobs=False,
        stop=tuple(rollout.stop),
        stop_token_ids=session.stop_tokens,
    )
    plan = RolloutPlan(partial(single_completion, sampling=sampling), rollout.n, config.seed, "validation")
    workers = RolloutWorkers(executor, engine, scoring, None, session.timed, rollout.free_memory)
    return Generation(prompts, workers, plan)


def _rollout(config: SFTConfig, longest: int, engines: Mapping[str, Any]) -> RolloutEngine:
    spec = RolloutSpec(
        model=config.model,
        options=config.rollout.options,
        max_model_len=longest,
        seed=config.seed,
        train_engine=engines.get("actor"),
        adapter_rank=adapter_rank(config.actor.options),
    )
    return plugins.get(config.rollout.plugin_group, config.rollout.engine).build(spec)  # type: ignore[no-any-return]


def held_out_prompts(config: SFTConfig, samples: Sequence[SFTSample], tokenizer: Any) -> list[PromptSample]:
    """Return the prompts of validation: with a reward all of them, else those that are logged.

    A reward gets the rows of files with a prompt column, ground truth and other columns included. Otherwise a prompt is
    what precedes the last learned part of a sample, and that part the reference answer.
    """
    data = config.data
    if config.reward is not None and all(_has_prompts(file, data) for file in data.val_files):
        shared = {name: getattr(data, name) for name in DataFiles.model_fields if name != "weights"}
        settings = DataSettings(**{**shared, "train_files": data.val_files}, max_prompt_length=data.max_length)
        return list(load_prompts(settings, data.val_files, tokenizer, data.val_limit))
    chosen = list(range(len(samples)))
    if config.reward is None:
        random.Random(LOGGED_ORDER_SEED).shuffle(chosen)
        chosen = sorted(chosen[: config.trainer.log_val_generations])
    return [_prompt(samples[number], place, tokenizer) for place, number in enumerate(chosen)]


def _has_prompts(file: str, data: DataFiles) -> bool:
    if is_tokenized(Path(file)):
        return False
    names = names_in(next(open_file(file, every_column, 1).chunks))
    return data.prompt_key in names and not {*RENDERED} & {*names}


def _prompt(sample: SFTSample, index: int, tokenizer: Any) -> PromptSample:
    """Return what precedes the last learned part of ``sample`` as a prompt."""
    end = sample.mask.rindex(1) + 1
    start = sample.mask.rfind(0, 0, end) + 1
    tokens = sample.tokens.tolist()
    text = tokenizer.decode(tokens[:start], skip_special_tokens=False)
    answer = tokenizer.decode(tokens[start:end], skip_special_tokens=True).strip()
    message = {"role": "user", "content": text}
    return PromptSample(tokens[:start], [message], answer, sample.source, index=index, position=index)


def validate_generations(session: DatasetSession[SFTConfig]) -> Validation:
    """Generate with the actor's weights; return the scores by source, and a table of completions."""
    generation: Generation = session.more
    config, executor = session.config, session.executor
    workers, prompts = generation.workers, generation.prompts
    executor.sync_weights(session.actor, workers.rollout, session.batches.drawn, WeightSyncSettings())
    size, parts = config.data.val_batch_size or len(prompts), []
    for start in range(0, len(prompts), size):
        samples = roll_out_together(workers, generation.plan, prompts[start : start + size])
        scores = samples.scores.result()
        batch = samples.batch.with_columns(**{name: scores[name] for name in scores.names})
        parts.append(batch.select(*BATCH_COLUMNS, "response_length"))
    metrics, table = executor.compute(metrics_and_table, joined(parts), config.trainer.log_val_generations)
    table = with_prompts(table, session.tokenizer)
    return Validation(metrics, table.columns, table.rows)
