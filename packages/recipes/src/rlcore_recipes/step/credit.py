"""Credit: which rewards reach a token of a trajectory with several rows, and what its trajectory is compared with.

An advantage estimator sees sequences. Those of ``credit: trajectory`` are whole trajectories: their rows one after
another, of which tokens that an earlier row has are no actions again. So each trajectory counts once in a baseline, and
a reward reaches all tokens before it, in earlier rows too. Those of ``turn`` are its turns, each with what it and later
turns earned; those of ``branch`` are its rows, each with the rewards on its own path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlcore.algorithms.sequences import per_token, sequence_sums, trained_mask
from rlcore.batch import Batch
from rlcore.batch.alignment import predicted_mask
from rlcore_recipes.rollouts.trees import as_sequences, first_tokens, longest_rows, trajectory_index, turn_rewards
from rlcore_recipes.settings import AlgorithmSettings


@dataclass(frozen=True)
class View:
    """What an advantage estimator reads of a batch.

    Attributes:
        batch: sequences of valid trajectories, with ``score``.
        tokens: ``[T']`` int64, the place in the whole batch of each token of ``batch``.
        first: ``[T']`` int64, for each token the first one in ``batch`` that is the same token of its trajectory.
        copies: whether all copies of a token are credited with the same.
        averages: whether that is the mean over the copies; else the first one's.
    """

    batch: Batch
    tokens: torch.Tensor
    first: torch.Tensor
    copies: bool = True
    averages: bool = False

    def back(self, columns: Batch, batch: Batch) -> Batch:
        """Return the estimator's per-token ``columns`` for the tokens of the whole ``batch``, 0 on tokens that are not
        trained; copies of a token get the value of the first one, or the mean over all of them."""
        found = {name: self._back(columns.flat(name), batch.total_tokens) for name in columns.names}
        mask = trained_mask(batch)
        shown = {n: values if n == "token_rewards" else torch.where(mask, values, 0) for n, values in found.items()}
        return Batch({name: batch.jagged(values) for name, values in shown.items()})

    def _back(self, values: torch.Tensor, total: int) -> torch.Tensor:
        if self.averages:
            sums = torch.zeros_like(values).index_add_(0, self.first, values)
            values = sums / self.first.bincount(minlength=len(values)).clamp(min=1)
        result = values.new_zeros(total)
        result[self.tokens] = values[self.first] if self.copies else values
        return result


def estimator_view(batch: Batch, algorithm: AlgorithmSettings) -> View | None:
    """Return what the advantage estimator reads of ``batch``; None: the batch itself, whose rows are trajectories."""
    if "trajectory" not in batch:
        return None
    tokens = per_token(batch["valid"], batch.lengths).nonzero().flatten()
    rows = batch.filter(batch["valid"])
    first = first_tokens(rows)
    if algorithm.credit == "branch":
        # every row has all rewards and log-probs of its path, although shared tokens have them in the first row alone
        paths = rows.with_columns(**{name: rows.jagged(rows.flat(name)[first]) for name in rows.jagged_names})
        own = sequence_sums(paths.flat("step_rewards"), rows.lengths)
        view = paths.with_columns(score=rows["score"] - turn_rewards(rows)[trajectory_index(rows)] + own)
        once = algorithm.shared_tokens == "once"
        return View(view, tokens, first, copies=once, averages=once)
    mask = predicted_mask(rows.flat("loss_mask") * (first == torch.arange(len(first))), rows.lengths)
    actions = rows.with_columns(loss_mask=rows.jagged(mask), response_length=longest_rows(rows))
    return View(as_sequences(actions), tokens, first)
