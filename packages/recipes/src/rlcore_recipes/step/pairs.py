"""Pairs of completions: which are compared, and the update on them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from rlcore.algorithms.preferences import PreferenceObjective
from rlcore.algorithms.shaping import overlong_punishment, terminal_rewards
from rlcore.batch import Batch
from rlcore.metrics import Metrics
from rlcore_recipes.rollouts.given import GIVEN_REASON
from rlcore_recipes.rollouts.trees import last_rows
from rlcore_recipes.run.session import Session
from rlcore_recipes.settings.online_preference import PairAlgorithmSettings
from rlcore_recipes.step.preferences import summed_logprobs
from rlcore_recipes.step.reference import reference_forward
from rlcore_recipes.step.update import train_epochs


def completion_pairs(session: Session[Any], batch: Batch) -> tuple[Batch, Batch, Metrics]:
    """Return ``batch`` with ``token_rewards``; the pairs that ``algorithm.pairs`` builds; and metrics under ``pairs/``.

    Pairs have two rows each, next to each other, with ``tokens``, ``loss_mask``, ``pair`` (dense int64), ``side``
    (dense int64: 0 chosen, 1 rejected) and ``margin`` (dense fp32: the difference of the scores).
    """
    config = session.config
    episode = [name for name in ("trajectory",) if name in batch]
    columns = batch.select("loss_mask", "score", "group", "reward_result", "response_length", *episode)
    with session.timed("pairs"):
        rewards, rows, margins, metrics = session.executor.compute(
            compared, columns, config.algorithm, config.data.max_response_length
        )
    pairs = rows_as_pairs(batch, rows).with_columns(margin=margins.repeat_interleave(2))
    return batch.with_columns(token_rewards=rewards["token_rewards"]), pairs, metrics


def rows_as_pairs(batch: Batch, rows: torch.Tensor) -> Batch:
    """Return the pairs of ``rows`` ``[P, 2]`` (chosen, rejected) of ``batch``, with the columns that losses read."""
    pairs = batch.select("tokens", "loss_mask").take(rows.flatten())
    numbers, sides = torch.arange(len(rows)).repeat_interleave(2), torch.tensor([0, 1]).repeat(len(rows))
    return pairs.with_columns(pair=numbers, side=sides)


def demonstration_pairs(session: Session[Any], batch: Batch) -> tuple[Batch, Batch, Metrics]:
    """Return the sampled rows of ``batch`` with ``token_rewards``; pairs of each with the demonstration of its prompt,
    as `completion_pairs` has them; and metrics under ``pairs/``."""
    columns = batch.select("tokens", "loss_mask", "score", "group", "response_length", "finish_reason")
    with session.timed("pairs"):
        rewards, rows, sampled, metrics = session.executor.compute(demonstrated, columns)
    batch = batch.with_columns(token_rewards=rewards["token_rewards"])
    return batch.take(sampled), rows_as_pairs(batch, rows), metrics


def demonstrated(batch: Batch) -> tuple[Batch, torch.Tensor, torch.Tensor, Metrics]:
    """Return ``token_rewards``; the rows of each pair ``[P, 2]``; those of sampled completions; metrics.

    A completion without a token, or equal to the demonstration, is in no pair; ``pairs/equal`` counts the latter.
    """
    tokens, metrics = batch["tokens"].to_list(), Metrics()
    given = {g: row for row, g in enumerate(batch["group"].tolist()) if batch["finish_reason"][row] == GIVEN_REASON}
    sampled = [row for row in range(len(batch)) if batch["finish_reason"][row] != GIVEN_REASON]
    pairs = [(given[int(batch["group"][row])], row) for row in sampled if batch["response_length"][row] > 0]
    different = [(one, other) for one, other in pairs if not torch.equal(tokens[one], tokens[other])]
    metrics.sum("pairs/count", len(different))
    metrics.sum("pairs/equal", len(pairs) - len(different))
    rewards = Batch({"token_rewards": batch.jagged(terminal_rewards(batch, batch["score"]))})
    rows = torch.tensor(different, dtype=torch.int64).reshape(-1, 2)
    return rewards, rows, torch.tensor(sampled, dtype=torch.int64), metrics


def compared(
    batch: Batch, algorithm: PairAlgorithmSettings, max_response_length: int
) -> tuple[Batch, torch.Tensor, torch.Tensor, Metrics]:
    """Return ``token_rewards``; the rows of each pair ``[P, 2]``; the differences of their scores ``[P]``; metrics.

    Completions whose reward failed, or that have no token, are in no pair. Of an episode with several rows the last one
    is compared.
    """
    scores, metrics = batch["score"], Metrics()
    if algorithm.overlong is not None:
        punishment = overlong_punishment(batch["response_length"], max_response_length, algorithm.overlong)
        scores = scores + punishment
        metrics.mean("reward/overlong_punishment", float(punishment.mean()))
    usable = torch.tensor([result.error is None for result in batch["reward_result"]], dtype=torch.bool)
    left = (usable & last_rows(batch) & (batch["response_length"] > 0)).nonzero().squeeze(-1)
    chosen, rejected = algorithm.pairs(scores[left], batch["group"][left])
    rows = left[torch.stack([chosen, rejected], dim=1)]
    margins = scores[rows[:, 0]] - scores[rows[:, 1]]
    groups = len(torch.unique(batch["group"]))
    metrics.sum("pairs/count", len(rows))
    metrics.mean("pairs/prompts", len(torch.unique(batch["group"][rows[:, 0]])) / max(groups, 1), groups)
    if len(rows):
        metrics.mean("pairs/score_gap", margins.mean(), len(rows))
    rewards = terminal_rewards(batch, torch.where(last_rows(batch), scores, 0))
    return Batch({"token_rewards": batch.jagged(rewards)}), rows, margins, metrics


def add_pair_reference(session: Session[Any], pairs: Batch) -> Batch:
    """Add ``ref_answer_logprob`` (dense fp64), if the loss has a reference and there are pairs."""
    config, roles = session.config, session.roles
    if not config.needs_ref or not len(pairs):
        return pairs
    with session.timed("ref"):
        found = reference_forward(
            roles.actor, roles.ref, pairs, temperature=config.rollout.temperature, offload=config.ref.offload
        )
        sums = session.executor.compute(summed_logprobs, found.select("logprobs"))
    return pairs.with_columns(ref_answer_logprob=sums)


def update_on_pairs(session: Session[Any], pairs: Batch) -> Metrics:
    """Train the policy on ``pairs``; return metrics under ``actor/``. Without pairs there is no update.

    They are divided evenly among as many mini-batches as a batch of prompts has, so that the number of optimizer steps,
    which the learning-rate schedule counts, does not depend on how many prompts give pairs.
    """
    config = session.config
    objective = PreferenceObjective(config.actor.objective, config.rollout.temperature)
    total = len(pairs) // 2
    count = min(config.data.train_batch_size // config.mini_batch_size, total)
    ends = [2 * (total * number // count) for number in range(count + 1)] if count else [0]
    with session.timed("update_actor"):
        parts = [(pairs.slice(start, end), objective) for start, end in pairwise(ends)]
        return train_epochs(session.roles.actor, parts, config.actor.epochs).prefixed("actor/")
