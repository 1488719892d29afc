"""What the policy wrote in a trajectory, as tokens and as text, without tokens of prompts, tools and users."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch

from rlcore.batch import Batch
from rlcore_recipes.rollouts.trees import own_tokens, trajectory_index


def policy_turns(batch: Batch) -> list[list[list[int]]]:
    """Return the turns of each trajectory: the token ids that the policy sampled without others between them.

    A turn that several rows of a trajectory share is returned once.

    Args:
        batch: with ``tokens`` and ``token_version``, and the columns of trees where there are any.
    """
    places = (own_tokens(batch) & (batch.flat("token_version") >= 0)).nonzero().flatten()
    rows = torch.searchsorted(batch.lengths.cumsum(0), places, right=True)
    after_gap = torch.diff(places, prepend=places[:1]) > 1
    starts = (after_gap | (torch.diff(rows, prepend=rows[:1]) > 0)).nonzero().flatten()
    pieces = torch.tensor_split(batch.flat("tokens")[places], starts.tolist())
    index = trajectory_index(batch)
    owners = index[rows[torch.cat([starts.new_zeros(1), starts])[: len(rows)]]].tolist() if len(rows) else []
    turns: list[list[list[int]]] = [[] for _ in range(int(index.max()) + 1 if len(index) else 0)]
    for owner, piece in zip(owners, pieces):
        turns[owner].append(piece.tolist())
    return turns


def completion_tokens(batch: Batch) -> list[list[int]]:
    """Return the token ids that the policy sampled in each trajectory."""
    return [list(chain.from_iterable(turns)) for turns in policy_turns(batch)]


def completion_texts(completions: Sequence[Sequence[int]], tokenizer: Any, ends: frozenset[int] | None) -> list[str]:
    """Return the completions as text.

    Args:
        ends: None leaves all special tokens out; otherwise they are kept, except one of ``ends`` as the last token.
    """
    if ends is None:
        return tokenizer.batch_decode(completions, skip_special_tokens=True)  # type: ignore[no-any-return]
    # shift allowed: without the end token
    bare = [tokens[:-1] if tokens and tokens[-1] in ends else tokens for tokens in completions]
    return tokenizer.batch_decode(bare, skip_special_tokens=False)  # type: ignore[no-any-return]


def joined_turns(turns: Iterable[Sequence[Sequence[int]]], tokenizer: Any, ends: frozenset[int] | None) -> list[str]:
    """Return the turns of each trajectory as one text: each turn as `completion_texts` says, one below the other."""
    each = list(turns)
    texts = iter(completion_texts(list(chain.from_iterable(each)), tokenizer, ends))
    return ["\n".join(next(texts) for _ in turns) for turns in each]
