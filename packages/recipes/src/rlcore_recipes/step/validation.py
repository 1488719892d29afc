"""Validation: completions for held-out prompts, and their scores per data source."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from rlcore.batch import Batch
from rlcore.engines import RewardResult
from rlcore.engines.episode import PromptSample
from rlcore_recipes.rollouts.plan import validation_plan
from rlcore_recipes.rollouts.source import joined
from rlcore_recipes.rollouts.synchronous import roll_out_together
from rlcore_recipes.rollouts.trees import first_rows, longest_rows, scored_rows
from rlcore_recipes.run.records import Table
from rlcore_recipes.run.session import Session
from rlcore_recipes.run.trainable import Validation
from rlcore_recipes.step.episodes import episode_metrics
from rlcore_recipes.step.logged_rows import BATCH_COLUMNS, OF_EPISODES, table_of, with_prompts
from rlcore_recipes.step.metrics import failed_ratio
from rlcore_recipes.step.rollout import add_scores

LOGGED_ORDER_SEED = 42  # the same prompts are shown at every validation


def validate_completions(session: Session[Any]) -> Validation:
    """Validate on completions or episodes of the held-out prompts, sampled as ``rollout.validation`` says."""
    plan = validation_plan(session.config, session.stop_tokens, session.end_tokens)

    def answered(prompts: Sequence[PromptSample]) -> Batch:
        samples = roll_out_together(session.workers, plan, prompts)
        return add_scores(session, samples.batch, samples)

    return validate_prompts(session, answered)


def validate_prompts(session: Session[Any], answered: Callable[[Sequence[PromptSample]], Batch]) -> Validation:
    """Return metrics over all held-out prompts, and ``trainer.log_val_generations`` of their completions.

    Args:
        answered: generates for prompts and scores; the completions of one prompt have one ``group``. It is given
            ``data.val_batch_size`` prompts at a time.
    """
    config, prompts = session.config, session.val_prompts
    assert prompts is not None
    size = config.data.val_batch_size or len(prompts)
    parts = [answered(prompts[start : start + size]) for start in range(0, len(prompts), size)]
    columns: tuple[str, ...] = (*BATCH_COLUMNS, "response_length")
    if "reward_model_score" in parts[0]:
        columns += ("reward_model_score",)
    if "trajectory" in parts[0]:
        columns += (*OF_EPISODES, "trajectory", "shared_prefix", "valid", "episode_metrics")
    batch = joined([part.select(*columns) for part in parts])
    metrics, table = session.executor.compute(metrics_and_table, batch, config.trainer.log_val_generations)
    table = with_prompts(table, session.tokenizer)
    return Validation(metrics, table.columns, table.rows)


def metrics_and_table(batch: Batch, logged: int) -> tuple[dict[str, float], Table]:
    """Return the metrics of ``batch`` and the table of ``logged`` samples."""
    episodes = {f"val-aux/{name}": value for name, value in episode_metrics(batch).items()}
    n = int(batch["group"][first_rows(batch)].unique(return_counts=True)[1].max()) if episodes else None
    batch = batch.with_columns(response_length=longest_rows(batch))
    metrics = validation_metrics(batch.filter(scored_rows(batch)), n) | episodes
    return metrics, logged_table(batch.filter(first_rows(batch)), logged)


def validation_metrics(batch: Batch, n: int | None = None) -> dict[str, float]:
    """Return ``mean@N`` per data source, with N completions per prompt; for N > 1 also ``best@N`` and the like.

    ``best@N`` (``worst@N``) is the mean over prompts of the best (worst) of the N scores; ``maj@N`` that of the score
    of the most frequent answer, where the reward reads answers. Scores are under ``val-core/{source}/reward``, the
    reward's extra numbers under ``val-aux/{source}/{name}``. A reward model has its share in all scores but ``maj@N``,
    which is the reward's alone; its own are under ``val-aux/{source}/reward_model_score``.

    Args:
        batch: one row per trajectory; if no episode is valid, it is empty, and nothing is returned.
        n: N, where invalid episodes are not in ``batch``; None: the rows of a prompt.
    """
    if not len(batch):
        return {}
    by_source: defaultdict[str, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (source, group) in enumerate(zip(batch["data_source"], batch["group"].tolist())):
        by_source[source][group].append(index)
    scores, results = batch["score"].tolist(), batch["reward_result"]
    found: dict[str, float] = {}
    for source, groups in sorted(by_source.items()):
        of_all = [[scores[i] for i in group] for group in groups.values()]
        found |= group_metrics(f"val-core/{source}/reward", of_all, n)
        answers = [[results[i] for i in group] for group in groups.values()]
        votes = n or max(map(len, answers))
        if votes > 1 and any(result.answer is not None for group in answers for result in group):
            found[f"val-core/{source}/reward/maj@{votes}"] = fmean(map(majority_score, answers))
        names = sorted({name for group in groups.values() for i in group for name in results[i].extras})
        for name in names:
            values = [
                [results[i].extras[name] for i in group if name in results[i].extras] for group in groups.values()
            ]
            found |= group_metrics(f"val-aux/{source}/{name}", [group for group in values if group], n)
        if "reward_model_score" in batch:
            model_scores = batch["reward_model_score"].tolist()
            of_model = [[model_scores[i] for i in group] for group in groups.values()]
            found |= group_metrics(f"val-aux/{source}/reward_model_score", of_model, n)
    lengths: torch.Tensor = batch["response_length"]
    found["val-aux/response_length/mean"] = float(lengths.float().mean())
    found["val-aux/response_length/clip_ratio"] = batch["finish_reason"].count("length") / len(batch)
    found["val-aux/reward_error_ratio"] = failed_ratio(results)
    return found


def group_metrics(name: str, groups: Sequence[Sequence[float]], n: int | None = None) -> Mapping[str, float]:
    """Return mean, best and worst of the scores in each group, averaged over groups.

    Args:
        n: samples of a group, in the names of the metrics; None: those of the largest one.
    """
    n = n or max(map(len, groups))
    found = {f"{name}/mean@{n}": fmean(map(fmean, groups))}
    if n > 1:
        found[f"{name}/best@{n}"] = fmean(map(max, groups))
        found[f"{name}/worst@{n}"] = fmean(map(min, groups))
    return found


def majority_score(results: Sequence[RewardResult]) -> float:
    """Return the score of the most frequent answer (the first of equals); of any sample if none has an answer."""
    votes = Counter(result.answer for result in results if result.answer is not None)
    winner = votes.most_common(1)[0][0] if votes else None
    return next(result.score for result in results if result.answer == winner)


def logged_table(batch: Batch, count: int) -> Table:
    """``count`` samples as a table, for the same prompts every time; the prompt still as token ids."""
    chosen = list(range(len(batch)))
    random.Random(LOGGED_ORDER_SEED).shuffle(chosen)
    return table_of(batch, sorted(chosen[:count]))
