"""Rejection sampling: the weights with which completions are imitated, and the file of those that are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from rlcore.algorithms.selection import rank_in_group
from rlcore.algorithms.shaping import overlong_punishment
from rlcore.batch import Batch
from rlcore.config import Algorithm
from rlcore.errors import BatchError
from rlcore.metrics import Metrics
from rlcore_recipes.data.selected import write_selected
from rlcore_recipes.ranks import on_rank_zero
from rlcore_recipes.rollouts.completion_text import completion_texts, completion_tokens
from rlcore_recipes.rollouts.trees import first_rows, longest_rows, trajectory_index
from rlcore_recipes.run.folder import SELECTED
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings.selection import RaftAlgorithmSettings

READ = ("score", "group", "completion", "finish_reason", "reward_result", "response_length")


def add_sample_weights(session: Session[Any], batch: Batch, prefix: str = "selection") -> tuple[Batch, Metrics]:
    """Add ``sample_weight`` (dense fp32), 0 for samples that are left out; return metrics under ``prefix/``."""
    config = session.config
    read = [*READ, *(name for name in ("trajectory",) if name in batch)]
    with session.timed("selection"):
        weights, metrics = session.executor.compute(
            row_weights, batch.select(*read), config.algorithm, config.data.max_response_length
        )
    return batch.with_columns(sample_weight=weights), metrics.prefixed(f"{prefix}/")


def row_weights(
    batch: Batch, algorithm: RaftAlgorithmSettings, max_response_length: int
) -> tuple[torch.Tensor, Metrics]:
    """Return the `sample_weights` of trajectories for all of their rows."""
    episodes = batch.with_columns(response_length=longest_rows(batch)).filter(first_rows(batch))
    weights, metrics = sample_weights(episodes, algorithm, max_response_length)
    return weights[trajectory_index(batch)], metrics


def sample_weights(
    batch: Batch, algorithm: RaftAlgorithmSettings, max_response_length: int
) -> tuple[torch.Tensor, Metrics]:
    """Return the weights ``[B]`` fp32, and how many samples each rule left out.

    Rules apply in this order, each to the samples that the ones before left: the reward failed; truncated; equal to a
    better or an earlier completion of its prompt; not chosen by the selector; more than ``max_per_prompt``. So the
    counts ``failed``, ``truncated``, ``duplicates``, ``rejected``, ``surplus`` and ``kept`` sum up to ``samples``.
    """
    settings, group = algorithm.selection, batch["group"]
    scores = batch["score"]
    if algorithm.overlong is not None:
        scores = scores + overlong_punishment(batch["response_length"], max_response_length, algorithm.overlong)
    metrics = Metrics()
    metrics.sum("samples", len(batch))
    left = torch.tensor([result.error is None for result in batch["reward_result"]], dtype=torch.bool)
    metrics.sum("failed", len(batch) - int(left.sum()))

    def drop(name: str, chosen: torch.Tensor, applies: bool = True) -> None:
        """Leave the samples ``chosen`` out, if ``applies``, and count them."""
        gone = left & chosen & applies
        metrics.sum(name, int(gone.sum()))
        left[gone] = False

    complete = ("stop", "length") if settings.keep_truncated else ("stop",)
    drop("truncated", torch.tensor([reason not in complete for reason in batch["finish_reason"]], dtype=torch.bool))
    drop("duplicates", _repeated(batch["completion"], scores, group, left), settings.deduplicate)
    weights = torch.zeros(len(batch))
    weights[left] = _selected(settings.selector, scores[left], group[left])
    drop("rejected", weights <= 0)
    if settings.max_per_prompt is not None:
        surplus = torch.zeros_like(left)
        surplus[left] = rank_in_group(scores[left], group[left]) >= settings.max_per_prompt
        drop("surplus", surplus)
    else:
        metrics.sum("surplus", 0)
    metrics.sum("kept", int(left.sum()))
    prompts = len(torch.unique(group))
    metrics.mean("prompts_kept", len(torch.unique(group[left])) / max(prompts, 1), prompts)
    if left.any():
        metrics.mean("kept_score", scores[left].mean(), int(left.sum()))
    return torch.where(left, weights, 0), metrics


def _selected(selector: Algorithm, scores: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return what ``selector`` gives, checked.

    Raises:
        BatchError: it is not one finite weight for each sample.
    """
    weights: torch.Tensor = selector(scores, group)
    if weights.shape != scores.shape or not weights.isfinite().all():
        raise BatchError(
            f"the sample selector {selector.name!r} must return one finite weight for each of {len(scores)} samples, "
            f"not a tensor of shape {list(weights.shape)}{' with NaN or infinity' * (weights.shape == scores.shape)}"
        )
    return weights.float()


def _repeated(texts: list[str], scores: torch.Tensor, group: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Return which samples have the text of another one of their group, that has a higher score or comes before."""
    seen: set[tuple[int, str]] = set()
    found = torch.zeros_like(left)
    for row in scores.argsort(descending=True, stable=True).tolist():
        if left[row]:
            key = int(group[row]), texts[row].strip()
            found[row] = key in seen
            seen.add(key)
    return found


def save_selected(session: Session[Any], batch: Batch, number: int) -> dict[str, float]:
    """Write the samples of ``batch`` with a weight into the run's folder, as `write_selected` says.

    Returns:
        ``selection/unsaved``: the number of them that no text for SFT can be made of, as they have no end token or no
        text.
    """
    config = session.config
    if not config.algorithm.selection.save:
        return {}
    if "trajectory" in batch:
        kept = batch["sample_weight"][first_rows(batch)] > 0
        session.warn_once(
            "selection/unsaved",
            "algorithm.selection.save writes single completions, not episodes of an environment: nothing is written. "
            "selection/unsaved counts the kept ones",
        )
        return {"selection/unsaved": float(kept.sum())}
    with session.timed("save_selected"):
        rows = session.executor.compute(selected_rows, batch.filter(batch["sample_weight"] > 0))
        texts = completion_texts([row.pop("tokens") for row in rows], session.tokenizer, session.end_tokens)
        saved = [
            {**row, "response": text}
            for row, text in zip(rows, texts)
            if row["finish_reason"] == "stop" and text.strip()
        ]
        on_rank_zero(partial(write_selected, config.trainer.out_dir / SELECTED, number, saved))
    return {"selection/unsaved": float(len(rows) - len(saved))}


def selected_rows(batch: Batch) -> list[dict[str, Any]]:
    """Return what is saved of each sample, with its completion as ``tokens``."""
    prompts = [messages if text is None else text for messages, text in zip(batch["messages"], batch["prompt_text"])]
    columns = {
        "prompt": prompts,
        "tokens": completion_tokens(batch),
        "score": batch["score"].tolist(),
        "sample_weight": batch["sample_weight"].tolist(),
        **{name: batch[name] for name in ("data_source", "ground_truth", "finish_reason")},
    }
    return [dict(zip(columns, values)) for values in zip(*columns.values())]
