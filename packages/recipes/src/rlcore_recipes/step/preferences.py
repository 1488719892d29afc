"""What preference losses read besides the policy's log-probs, and how a model is measured on held-out preferences."""

from __future__ import annotations

import torch

from rlcore.algorithms.preferences import PreferenceObjective
from rlcore.algorithms.sequences import sequence_sums
from rlcore.batch import Batch
from rlcore.engines import ForwardRequest
from rlcore_recipes.data.labelled import MISMATCHED
from rlcore_recipes.run.dataset_session import DatasetSession
from rlcore_recipes.run.trainable import Validation
from rlcore_recipes.settings.preference import PreferenceConfig
from rlcore_recipes.step.reference import reference_forward


def add_reference(session: DatasetSession[PreferenceConfig], batch: Batch) -> Batch:
    """Add ``ref_answer_logprob`` (dense fp64), unless it was precomputed or the loss has no reference."""
    config = session.config
    if not config.needs_ref or "ref_answer_logprob" in batch:
        return batch
    with session.timed("ref"):
        found = reference_forward(session.actor, session.ref, batch, offload=config.ref.offload)
        sums = session.executor.compute(summed_logprobs, found.select("logprobs"))
    return batch.with_columns(ref_answer_logprob=sums)


def add_kl(session: DatasetSession[PreferenceConfig], batch: Batch) -> Batch:
    """Return the rows to learn, with ``kl_log_ratio`` (dense fp64) if the loss reads it: log(π / π_ref) of the answer
    to another prompt, whose row the batch has for it."""
    if not session.config.needs_kl:
        return batch
    mismatched = batch["side"] == MISMATCHED
    others = batch.filter(mismatched)
    with session.timed("kl"):
        found = session.actor.forward(others.select("tokens", "loss_mask"), ForwardRequest(("logprobs",)))
        sums = session.executor.compute(summed_logprobs, found.select("logprobs"))
    return batch.filter(~mismatched).with_columns(kl_log_ratio=sums - others["ref_answer_logprob"])


def summed_logprobs(batch: Batch) -> torch.Tensor:
    """Return the sum of ``logprobs`` of each row, ``[B]`` fp64; those that are not trained are 0."""
    return sequence_sums(batch.flat("logprobs").double(), batch.lengths)


def measure_preferences(session: DatasetSession[PreferenceConfig]) -> Validation:
    """Return the loss and its metrics over all held-out samples under ``val/``, and the accuracy (without pairs, the
    margin) of each data source."""
    held_out, size = session.held_out, session.config.data.val_batch_size
    assert held_out is not None
    size, parts = size or len(held_out), []
    for start in range(0, len(held_out), size):
        samples = held_out.take(range(start, min(start + size, len(held_out))))
        batch = add_kl(session, add_reference(session, samples))
        found = session.actor.forward(batch.select("tokens", "loss_mask"), ForwardRequest(("logprobs",)))
        logprobs = session.read(found, "logprobs")
        kept = batch.drop("tokens").with_columns(pair=batch["pair"] + start, logprobs=logprobs)
        parts.append(kept)
    return Validation(preference_metrics(PreferenceObjective(session.config.actor.objective), Batch.concat(parts)))


def preference_metrics(objective: PreferenceObjective, batch: Batch) -> dict[str, float]:
    """Return the metrics of ``batch``, which has the policy's ``logprobs``."""
    found = {f"val/{name}": value for name, value in _measured(objective, batch).items()}
    name = "rewards/accuracies" if objective.paired else "rewards/margins"
    for source in sorted({*batch["data_source"]}):
        part = _measured(objective, batch.filter([entry == source for entry in batch["data_source"]]))
        if name in part:
            found[f"val-core/{source}/{name}"] = part[name]
    return found


def _measured(objective: PreferenceObjective, batch: Batch) -> dict[str, float]:
    with torch.no_grad():
        _, metrics = objective.loss({"logprobs": batch.flat("logprobs")}, batch, objective.denominators(batch))
    return with_margins(metrics.to_dict())


def with_margins(found: dict[str, float]) -> dict[str, float]:
    """Return ``found`` with the difference of both sides' rewards, which single answers lack."""
    sides = found.get("rewards/chosen"), found.get("rewards/rejected")
    if "rewards/margins" in found or sides[0] is None or sides[1] is None:
        return found
    return found | {"rewards/margins": sides[0] - sides[1]}
