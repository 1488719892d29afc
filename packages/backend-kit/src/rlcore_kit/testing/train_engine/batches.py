"""Batches for training, and the outputs of a forward pass of transformers over them."""

from __future__ import annotations

from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import TrainEngine

LENGTHS = (5, 30, 17, 2, 40, 1, 9)


def make_pairs() -> Batch:
    """Make eight samples in four pairs; the samples of a pair are far apart and of different lengths."""
    return make_batch((5, 30, 17, 2, 40, 6, 9, 21)).with_columns(pair=torch.tensor([0, 1, 2, 3, 3, 0, 1, 2]))


def make_batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """Make random tokens, including the padding token (0), with a weight per token.

    About a third of each sequence, at its start, is masked: the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(5, 250, (length,), generator=generator) for length in lengths]
    for sequence in tokens:
        sequence[len(sequence) // 2] = 0  # nothing is padded: the padding token is an ordinary token
    masks = [(torch.arange(length) >= max(1, length // 3)).float() for length in lengths]
    weights = [torch.randn(length, generator=generator) for length in lengths]
    return Batch(
        {
            "tokens": Jagged.from_list(tokens),
            "loss_mask": Jagged.from_list(masks),
            "weights": Jagged.from_list(weights),
        }
    )


def make_branching(seed: int = 0) -> Batch:
    """Make a batch as `make_batch`, whose samples begin with the same tokens: as a tree of conversations does."""
    batch = make_batch((40, 37, 29, 33, 40, 20, 9), seed)
    rows = batch["tokens"].to_list()
    for branch, origin, shared in ((1, 0, 24), (2, 1, 19), (3, 1, 30), (4, 0, 40), (5, 0, 20)):
        rows[branch][:shared] = rows[origin][:shared]
    return batch.with_columns(tokens=Jagged.from_list(rows))


def reference_outputs(model: Any, tokens: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probs and entropies ``[L]`` of one sequence with transformers; 0 for the first token."""
    logits = model(tokens[None], use_cache=False).logits[0, :-1].float() / temperature  # shift allowed: reference
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[1:, None]).squeeze(-1)  # shift allowed: reference
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    first = logits.new_zeros(1)
    return torch.cat([first, chosen]), torch.cat([first, entropy])


def exported(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """Return a copy of all weights by name."""
    return {name: tensor.cpu().clone() for bucket in engine.export_weights() for name, tensor in bucket.tensors}
