"""Preference optimisation on a data set: DPO and its variants, KTO, ORPO, SimPO (Rafailov et al., 2023,
arXiv:2305.18290, and others).

``actor.objective.loss`` chooses the loss, and the loss decides what the step needs: pairs or single answers, a
reference policy, an estimate of the KL divergence from it.
"""

from __future__ import annotations

from functools import partial

from rlcore.algorithms.preferences import PreferenceObjective
from rlcore.cli import run_recipe_module
from rlcore_recipes.data.labelled import load_labelled
from rlcore_recipes.data.preferences import load_pairs
from rlcore_recipes.run.dataset_session import DatasetSession, train_on_dataset
from rlcore_recipes.run.reference_cache import precompute_reference
from rlcore_recipes.run.restarts import restarting
from rlcore_recipes.settings.preference import PreferenceConfig
from rlcore_recipes.step.preferences import add_kl, add_reference, measure_preferences, with_margins


@restarting
def run(config: PreferenceConfig) -> None:
    """Train, from the beginning or from the last checkpoint, to the last step."""
    load = load_pairs if config.paired else partial(load_labelled, mismatched=config.needs_kl)
    train_on_dataset("dpo", config, load, step, measure_preferences, prepare=precompute_reference)


def step(session: DatasetSession[PreferenceConfig], number: int) -> dict[str, float]:
    """Make one optimizer step over the next batch of preferences."""
    samples = next(session.batches)
    batch = add_reference(session, samples)  # unless it was precomputed, or the loss has none
    batch = add_kl(session, batch)  # only for a loss that reads it
    with session.timed("update_actor"):
        metrics = session.actor.train(batch.drop("data_source"), PreferenceObjective(session.config.actor.objective))
    found = {f"train/{name}": value for name, value in with_margins(metrics.to_dict()).items()}
    return found | {"perf/total_num_tokens": float(samples.total_tokens)}


if __name__ == "__main__":
    run_recipe_module("dpo")
