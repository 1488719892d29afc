"""Reward models: a scalar score of an answer or of its steps, learned from comparisons or from labels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from rlcore.batch import Batch
from rlcore.cli import run_recipe_module
from rlcore.metrics import Metrics
from rlcore_recipes.data.scored_answers import load_scored_answers
from rlcore_recipes.data.scored_pairs import load_scored_pairs
from rlcore_recipes.run.dataset_session import DatasetSession, LoadSamples, train_on_dataset
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.trainable import Validation
from rlcore_recipes.settings.supervised import RewardModelConfig


@restarting
def run(config: RewardModelConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_on_dataset("rm", config, loader(config), step, validate)


def loader(config: RewardModelConfig) -> LoadSamples:
    """Return what reads the samples that the loss of ``config`` needs: pairs, or answers with labels."""
    loss = config.actor.objective.loss.entry
    if "labels" not in loss.required_columns:
        return load_scored_pairs
    return partial(load_scored_answers, probabilities="probability_labels" in loss.traits)


def step(session: DatasetSession[RewardModelConfig], number: int) -> dict[str, float]:
    """Make one optimizer step over the next batch."""
    batch, objective = next(session.batches), session.config.objective
    metrics = session.actor.train(batch.drop("data_source"), objective).prefixed("train/").to_dict()
    return metrics | {"perf/total_num_tokens": float(batch.total_tokens)}


def validate(session: DatasetSession[RewardModelConfig]) -> Validation:
    """Measure loss, accuracy and scores over all held-out samples, and over those of each data source."""
    objective = session.config.objective
    parts: dict[str, list[Metrics]] = {}
    for batch in _held_out(session):
        outputs = session.actor.forward(batch.select("tokens", "loss_mask"), objective.request)
        scored = batch.with_columns(values=session.read(outputs, "values"))
        for name in ["", *sorted(set(batch["data_source"]))]:
            rows = [row for row, source in enumerate(batch["data_source"]) if name in ("", source)]
            part = scored.take(rows)
            _, metrics = objective.loss({"values": part.flat("values")}, part, objective.denominators(part))
            parts.setdefault(name, []).append(metrics)
    found: dict[str, float] = {}
    for name, measured in parts.items():
        found |= Metrics.merge(measured).prefixed(f"val-core/{name}/" if name else "val/").to_dict()
    return Validation(found)


def _held_out(session: DatasetSession[RewardModelConfig]) -> Iterator[Batch]:
    """Yield the held-out samples, ``data.val_batch_size`` at a time."""
    held_out = session.held_out
    assert held_out is not None
    size = session.config.data.val_batch_size or len(held_out)
    for start in range(0, len(held_out), size):
        yield held_out.take(range(start, min(start + size, len(held_out))))


if __name__ == "__main__":
    run_recipe_module("rm")
