"""Implicit process rewards: training their model on outcomes, and rewarding tokens with it."""

from __future__ import annotations

from typing import Any

import torch

from rlcore.algorithms.implicit_reward import ImplicitRewardObjective, implicit_rewards, pair_accuracy
from rlcore.algorithms.sequences import sequence_sums
from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest
from rlcore.metrics import Metrics
from rlcore_recipes.rollouts.trees import by_trajectories
from rlcore_recipes.run.session import Session
from rlcore_recipes.step.update import train_epochs

LABELS = ("score", "reward_result")
READ = ("tokens", "loss_mask", "ref_logprobs")


def update_prm(session: Session[Any], batch: Batch) -> Metrics:
    """Train the process reward model on the outcomes of ``batch``; return metrics under ``prm/``.

    Samples whose reward failed have no outcome and are left out; ``prm/unlabelled`` counts them.
    """
    config, prm, settings = session.config, session.roles.prm, session.config.prm
    assert prm is not None
    prompts, epochs = config.prm_sizes
    with session.timed("update_prm"):
        outcome, known = session.executor.compute(outcomes, batch.select(*LABELS), settings.right_above)
        read = [*READ, *(name for name in ("trajectory",) if name in batch)]
        labelled = batch.select(*read).with_columns(outcome=outcome).filter(known)
        objective = ImplicitRewardObjective(settings.beta, config.rollout.temperature)
        parts = [(part, objective) for part in by_trajectories(labelled, prompts * config.rollout.n)]
        metrics = train_epochs(prm, parts, epochs)
        metrics.sum("unlabelled", len(batch) - len(labelled))
    return metrics.prefixed("prm/")


def outcomes(batch: Batch, right_above: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which samples are right, ``[B]`` fp32, and of which that is known, ``[B]`` bool."""
    known = torch.tensor([result.error is None for result in batch["reward_result"]], dtype=torch.bool)
    return (batch["score"] > right_above).float(), known


def add_process_rewards(session: Session[Any], batch: Batch) -> tuple[Batch, Metrics]:
    """Add per-token ``process_rewards``; return metrics under ``prm/``."""
    prm, settings = session.roles.prm, session.config.prm
    assert prm is not None
    with session.timed("process_rewards"):
        request = ForwardRequest(("logprobs",), session.config.rollout.temperature)
        logprobs = prm.forward(batch.select("tokens", "loss_mask"), request)["logprobs"]
        if settings.offload:
            prm.offload()
        columns = batch.select("loss_mask", "ref_logprobs", "score", "group").with_columns(prm_logprobs=logprobs)
        found, metrics = session.executor.compute(rewarded, columns, settings.beta, settings.right_above)
    return batch.with_columns(process_rewards=found["process_rewards"]), metrics.prefixed("prm/")


def rewarded(batch: Batch, beta: float, right_above: float) -> tuple[Batch, Metrics]:
    """Return the column ``process_rewards``, and metrics of it.

    ``reward`` is the mean over samples of their sum; ``pair_accuracy`` the share of pairs of a right and a wrong
    completion of a prompt, ``pairs`` in number, in which the right one has the higher sum.
    """
    rewards = implicit_rewards(batch, batch.flat("prm_logprobs"), beta)
    sums = sequence_sums(rewards, batch.lengths)
    metrics = Metrics()
    metrics.mean("reward", sums.mean(), len(batch))
    right = (batch["score"] > right_above).float()
    accuracy, pairs = pair_accuracy(sums.cpu(), right, batch["group"])
    metrics.sum("pairs", pairs)
    metrics.mean("pair_accuracy", accuracy, pairs)
    column: Jagged = batch.jagged(rewards)
    return Batch({"process_rewards": column}), metrics
