"""Batches to train on, and what a plain forward pass of transformers computes for them."""

from __future__ import annotations

from typing import Any

import torch

from rlcore.batch import Batch, Jagged
from rlcore.engines import TrainEngine

LENGTHS = (5, 30, 17, 2, 40, 1, 9)


def make_pairs() -> Batch:
    """Eight samples, of which those that belong together are far apart and of different lengths."""
    return make_batch((5, 30, 17, 2, 40, 6, 9, 21)).with_columns(pair=torch.tensor([0, 1, 2, 3, 3, 0, 1, 2]))


def make_batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Batch:
    """Random tokens, the padding token (0) among them; about a third masked out at the start of each sequence (a
    prompt); ``weights`` per token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(5, 250, (length,), generator=generator) for length in lengths]
    for sequence in tokens:
        sequence[len(sequence) // 2] = 0  # a token like any other: nothing is padded
    masks = [(torch.arange(length) >= max(1, length // 3)).float() for length in lengths]
    weights = [torch.randn(length, generator=generator) for length in lengths]
    return Batch(
        {
            "tokens": Jagged.from_list(tokens),
            "loss_mask": Jagged.from_list(masks),
            "weights": Jagged.from_list(weights),
        }
    )


def reference_outputs(model: Any, tokens: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies ``[L]`` of one sequence by a plain transformers forward pass; 0 for the first token."""
    logits = model(tokens[None], use_cache=False).logits[0, :-1].float() / temperature  # shift allowed: reference
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[1:, None]).squeeze(-1)  # shift allowed: reference
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    first = logits.new_zeros(1)
    return torch.cat([first, chosen]), torch.cat([first, entropy])


def exported(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """A copy of all weights, by name."""
    return {name: tensor.cpu().clone() for bucket in engine.export_weights() for name, tensor in bucket.tensors}
