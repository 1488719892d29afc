"""Supervised fine-tuning: the likelihood of given answers."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import torch

from rlcore.algorithms.objectives import SFTObjective, SFTObjectiveSettings
from rlcore.batch import Batch
from rlcore.cli import run_recipe_module
from rlcore.engines import ForwardRequest, TrainEngine
from rlcore_recipes.data.sft import load_sft
from rlcore_recipes.run.dataset_session import DatasetSession, train_on_dataset
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.run.trainable import Validation
from rlcore_recipes.run.validation_generations import held_out_prompts, open_generation, validate_generations
from rlcore_recipes.settings.supervised import SFTConfig


@restarting
def run(config: SFTConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    train_on_dataset("sft", config, load_sft, step, validate, prepare=build_generation)


def build_generation(session: DatasetSession[SFTConfig]) -> None:
    """Build what generates in validation, if anything does."""
    config, held_out = session.config, session.held_out
    if not config.generates or held_out is None:
        return
    if config.reward is not None:
        session.max_error_ratio = config.reward.max_error_ratio
    prompts = held_out_prompts(config, held_out.samples, session.tokenizer)
    session.more = open_generation(session, prompts)


def step(session: DatasetSession[SFTConfig], number: int) -> dict[str, float]:
    """Make one optimizer step over the next batch."""
    with session.timed("data"):
        batch = next(session.batches)
    return learn(session.actor, batch, session.config.actor.objective, (session.config.seed << 32) + number)


def learn(actor: TrainEngine, batch: Batch, objective: SFTObjectiveSettings, seed: int = 0) -> dict[str, float]:
    """Make one optimizer step over ``batch``; return its metrics.

    Args:
        seed: of noise on embeddings, another one for every step.
    """
    columns = batch.select("tokens", "loss_mask")
    if objective.neftune_alpha:
        noise_seed = torch.randint(2**62, (len(batch),), generator=torch.Generator().manual_seed(seed))
        columns = columns.with_columns(noise_seed=noise_seed)
    metrics = actor.train(columns, SFTObjective(objective)).prefixed("train/").to_dict()
    learned = float(batch.flat("loss_mask").sum())
    return metrics | {
        "train/learned_tokens": learned,
        "train/learned_ratio": learned / batch.total_tokens,
        "perf/total_num_tokens": float(batch.total_tokens),
    }


def validate(session: DatasetSession[SFTConfig]) -> Validation:
    """Measure the mean negative log-likelihood per learned token of the held-out samples, also by source; generate."""
    held_out, size = session.held_out, session.config.data.val_batch_size
    assert held_out is not None
    nll: defaultdict[str, float] = defaultdict(float)
    learned: defaultdict[str, float] = defaultdict(float)
    size = size or len(held_out)
    for start in range(0, len(held_out), size):
        batch = held_out.take(range(start, min(start + size, len(held_out))))
        outputs = session.actor.forward(batch.select("tokens", "loss_mask"), ForwardRequest(("logprobs",)))
        logprobs = session.read(outputs, "logprobs")
        rows = zip(batch["data_source"], logprobs.to_list(), batch["loss_mask"].to_list())
        for source, found, mask in rows:
            nll[source] -= float(found.double().sum())
            learned[source] += float(mask.sum())
    loss = sum(nll.values()) / max(sum(learned.values()), 1.0)
    by_source = {f"val/loss/{source}": nll[source] / max(learned[source], 1.0) for source in sorted(nll)}
    metrics = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700.0)), **by_source}
    if session.more is None:
        return Validation(metrics)
    completions = validate_generations(session)
    return replace(completions, metrics=metrics | completions.metrics)


if __name__ == "__main__":
    run_recipe_module("sft")
