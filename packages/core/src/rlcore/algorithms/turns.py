"""Advantages of turns: runs of trained tokens, which others (answers of tools, messages of users) divide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field

from rlcore.algorithms.discounted import actions, at_trained, discounted_suffix_sums
from rlcore.algorithms.group_relative import grouped
from rlcore.algorithms.registries import Advantages, advantages
from rlcore.algorithms.sequences import per_token, sequence_sums
from rlcore.algorithms.shaping import terminal_rewards
from rlcore.batch import Batch
from rlcore.batch.alignment import next_entries
from rlcore.config import Config


class GiGPOParams(Config):
    """Parameters of ``gigpo``."""

    gamma: float = Field(0.95, ge=0, le=1, description="Discount γ of the rewards of later turns.")
    step_weight: float = Field(1.0, ge=0, description="Weight ω of the advantages of turns; 0 is GRPO.")
    normalize_std: bool = Field(True, description="Divide both advantages by their group's σ.")
    epsilon: float = Field(1e-6, gt=0, description="Added to σ.")


@advantages.register(
    "gigpo", params=GiGPOParams, required_columns={"turn_state"}, traits={"compares_group", "compares_turns"}
)
def gigpo(batch: Batch, params: GiGPOParams) -> Advantages:
    """Compute A(trajectory) + ω·A(turn), which compares turns of a group that were taken in the same state.

    A(trajectory) is GRPO's. A(turn) = (R − μ) / (σ + ε), where R = Σ_k γᵏ r_{t+k} is what the turn and later ones of
    its trajectory earned, and μ and σ are taken over the turns of the group with the same ``turn_state``. A turn that
    is alone in its state has A(turn) = 0.

    Source: GiGPO, Feng et al. 2025, arXiv:2505.10978 (eqs. 3, 7 and 8).
    """
    turns = turns_of(batch)
    totals = sequence_sums(batch.flat("token_rewards").double(), batch.lengths)
    whole = _normalised(totals, batch["group"], params)
    states = torch.stack([per_token(batch["group"], turns.counts), batch.flat("turn_state")[turns.mask][turns.starts]])
    place = torch.unique(states, dim=1, return_inverse=True)[1]
    earned = discounted_suffix_sums(turns.rewards, turns.counts, params.gamma)
    values = per_token(whole, turns.counts) + params.step_weight * _normalised(earned, place, params)
    return Advantages(at_trained(turns.mask, per_token(values.to(batch.flat("token_rewards")), turns.lengths)))


def _normalised(scores: torch.Tensor, group: torch.Tensor, params: GiGPOParams) -> torch.Tensor:
    groups = grouped(scores, group)
    return groups.deviation / (groups.std + params.epsilon) if params.normalize_std else groups.deviation


@dataclass(frozen=True)
class Turns:
    """The K turns of a batch.

    Attributes:
        mask: ``[T]`` bool: trained tokens.
        lengths: ``[K]`` int64, trained tokens of each turn.
        starts: ``[K]`` int64, the first of them among all trained tokens.
        counts: ``[B]`` int64, turns of each sequence.
        rewards: ``[K]`` fp64, what stands on each turn and on the tokens up to the next one.
    """

    mask: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    rewards: torch.Tensor


def turns_of(batch: Batch) -> Turns:
    """Return the turns of ``batch``, which has ``loss_mask`` and ``token_rewards``."""
    mask, rewards, lengths = actions(batch)
    ends = (mask & ~next_entries(mask, batch.lengths))[mask].cpu()
    counts = sequence_sums(ends.double(), lengths).long()
    stops = ends.nonzero().flatten() + 1
    sizes = torch.diff(stops, prepend=stops.new_zeros(1))
    return Turns(mask, sizes, stops - sizes, counts, sequence_sums(rewards.double(), sizes))


def turn_sequences(batch: Batch, discount: float) -> Batch:
    """Return a batch with a sequence for each turn of ``batch``, in the same order of tokens.

    A turn has the tokens before it that belong to no other turn; the last one of a sequence also those behind it. Its
    score, in ``token_rewards``, is what the turn and, discounted, later turns of the sequence earned. A sequence
    without trained tokens stays, with its score.
    """
    turns = turns_of(batch)
    ends = (turns.mask & ~next_entries(turns.mask, batch.lengths)).nonzero().flatten().cpu() + 1
    owner = torch.arange(len(batch)).repeat_interleave(turns.counts.clamp(min=1))
    stops = batch.lengths.cumsum(0)[owner]  # right for the last turn of a sequence, and for one without turns
    last = torch.diff(owner, append=owner.new_tensor([-1])) != 0
    stops[~last] = ends[
        torch.diff(per_token(torch.arange(len(batch)), turns.counts), append=ends.new_tensor([-1])) == 0
    ]
    lengths = torch.diff(stops, prepend=stops.new_zeros(1))
    earned = sequence_sums(batch.flat("token_rewards").double(), batch.lengths).cpu()[owner]
    earned[(turns.counts > 0)[owner]] = discounted_suffix_sums(turns.rewards, turns.counts, discount).cpu()
    split = batch.resequenced(lengths, owner)
    return split.with_columns(token_rewards=split.jagged(terminal_rewards(split, earned)))
