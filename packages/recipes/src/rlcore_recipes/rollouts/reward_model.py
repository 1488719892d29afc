"""Scores of a reward model, added to those of the reward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rlcore.algorithms.sequences import per_token
from rlcore.batch import Batch
from rlcore.batch.alignment import last_entries
from rlcore.controller import Executor
from rlcore.engines import ForwardRequest, ModelSettings, TrainEngine
from rlcore_recipes.rollouts.step_rewards import scores_of_steps
from rlcore_recipes.rollouts.trees import as_sequences, last_rows, own_tokens, trajectory_index
from rlcore_recipes.run.timing import Timings
from rlcore_recipes.settings import RewardModelSettings
from rlcore_recipes.settings.roles import StepRewardSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardModel:
    """A frozen model that scores whole sequences, of any number of groups together.

    Attributes:
        error_score: score of a sample for which the sum of both scores is not finite.
        policy: the model whose tokenizer made the tokens.
    """

    engine: TrainEngine
    settings: RewardModelSettings
    error_score: float
    executor: Executor
    timed: Timings
    policy: ModelSettings

    def values(self, batch: Batch) -> Batch:
        """Return the model's ``values`` at every token; with Ray they are computed in the background."""
        with self.timed.label("reward_model"):
            return self.engine.forward(batch.select("tokens"), ForwardRequest(("values",)))

    def added(self, scores: Batch, values: Batch, batch: Batch) -> Batch:
        """Return ``scores`` with ``reward_model_score`` (dense fp32) added.

        That is the value at each trajectory's last token or, of a process reward model, what
        `rlcore_recipes.rollouts.step_rewards.scores_of_steps` makes of the values; its other columns are added too,
        ``step_rewards`` times ``coeff``, to those of the environment where there is one. A sample for which the sum is
        not finite gets ``error_score``, and its result the error "reward_model".

        Args:
            scores: the columns of `Scorer.score`.
            batch: the trajectories.
        """
        with self.timed("reward_model"):
            found = self._found(values, batch)
            if self.settings.offload:
                self.engine.offload()
        model_score = found["reward_model_score"]
        total = scores["score"] + self.settings.coeff * model_score
        failed = ~torch.isfinite(total)
        if failed.any():
            scores = self._with_failures(scores, failed, batch["group"])
            total = torch.where(failed, self.error_score, total)
            model_score = torch.where(failed, 0.0, model_score)
        scores = scores.with_columns(**{name: found[name] for name in found.names if name != "step_rewards"})
        if "step_rewards" in found.names:
            weights = torch.where(failed, 0.0, self.settings.coeff)
            read = found.select("step_rewards")
            if "step_rewards" in batch:
                read = read.with_columns(given=batch["step_rewards"])
            rewards = self.executor.compute(weighted, read, weights)
            scores = scores.with_columns(step_rewards=rewards["step_rewards"])
        return scores.with_columns(score=total, reward_model_score=model_score)

    def _found(self, values: Batch, batch: Batch) -> Batch:
        """Return the scores that the model's values give."""
        if self.settings.weights is not None:
            values = self.executor.compute(combined, values.select("values"), self.settings.weights)
        episode = [name for name in ("trajectory", "shared_prefix") if name in batch]
        if self.settings.steps is None:
            read = batch.select(*episode).with_columns(values=values["values"])
            return self.executor.compute(last_values, read)
        read = batch.select("tokens", "loss_mask", *episode).with_columns(values=values["values"])
        return self.executor.compute(scores_of_trajectories, read, self.settings.steps, self.policy)

    def _with_failures(self, scores: Batch, failed: torch.Tensor, group: torch.Tensor) -> Batch:
        """Return ``scores`` with the error "reward_model" in the results of samples that ``failed``, ``[B]`` bool."""
        samples = failed.nonzero().flatten().tolist()
        prompts = sorted({int(group[sample]) for sample in samples})
        logger.warning(
            "the reward model's score of %d of %d samples is not finite; they get reward.error_score=%g (prompts %s%s)",
            len(samples),
            len(scores),
            self.error_score,
            ", ".join(map(str, prompts[:10])),
            " …" if len(prompts) > 10 else "",
        )
        marked = self.executor.compute(mark_failed, scores.select("reward_result"), frozenset(samples))
        return scores.with_columns(reward_result=marked["reward_result"])


def mark_failed(batch: Batch, failed: frozenset[int]) -> Batch:
    """Return ``reward_result`` with the error "reward_model" for the samples whose indices are in ``failed``."""
    results = batch["reward_result"]
    return Batch(
        {
            "reward_result": [
                replace(result, error=result.error or "reward_model") if index in failed else result
                for index, result in enumerate(results)
            ]
        }
    )


def combined(batch: Batch, weights: Sequence[float]) -> Batch:
    """Return the weighted sums ``[T]`` of ``values``, ``[T, outputs]`` or ``[T]``, as ``values``."""
    values = batch.flat("values").view(-1, len(weights))
    return Batch({"values": batch.jagged(values @ torch.tensor(weights))})


def last_values(batch: Batch) -> Batch:
    """Return ``values`` at the last token of each trajectory's last row as ``reward_model_score``: ``[B]`` fp32."""
    ends = last_entries(batch.flat("values"), batch.lengths)
    return Batch({"reward_model_score": ends[last_rows(batch)][trajectory_index(batch)]})


def scores_of_trajectories(batch: Batch, settings: StepRewardSettings, policy: ModelSettings) -> Batch:
    """Return `scores_of_steps` of each trajectory, whose steps are those of its rows, for all of its rows."""
    if "trajectory" not in batch:
        return scores_of_steps(batch, settings, policy)
    index, mask = trajectory_index(batch), batch.flat("loss_mask") * own_tokens(batch)
    found = scores_of_steps(as_sequences(batch.with_columns(loss_mask=batch.jagged(mask))), settings, policy)
    jagged = {name: batch.jagged(found.flat(name)) for name in found.jagged_names}
    return Batch({name: found[name][index] for name in found.names if name not in jagged} | jagged)


def weighted(batch: Batch, weights: torch.Tensor) -> Batch:
    """Return ``step_rewards`` times the weight of their sample, ``[B]``; 0 where the weight is 0; plus those ``given``,
    if there are any."""
    factors = per_token(weights, batch.lengths)
    rewards = torch.where(factors == 0, 0, batch.flat("step_rewards") * factors)
    return Batch({"step_rewards": batch.jagged(rewards + batch.flat("given") if "given" in batch else rewards)})
