"""The vocabulary-parallel head against plain torch, in values and gradients, over several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlcore_kit.testing.processes import RankPool
from rlcore_megatron.logprobs import logprobs_and_entropy

VOCABULARY = 10


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 6, generator=generator), torch.randn(VOCABULARY, 6, generator=generator)
    targets = torch.randint(0, VOCABULARY, (7,), generator=generator)
    return hidden, weight, targets, torch.randn(2, 7, generator=generator)


def divided(rows_per_rank: int, chunk: int | None, with_entropy: bool) -> dict[str, Any]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    hidden, weight, targets, upstream = inputs()
    first = dist.get_rank() * rows_per_rank
    own = weight[first : first + rows_per_rank].clone().requires_grad_()  # none on the last rank
    hidden.requires_grad_()
    group = dist.group.WORLD
    logprobs, entropy = logprobs_and_entropy(
        hidden, own, targets, first, group, temperature=0.7, chunk=chunk, with_entropy=with_entropy
    )
    loss = (logprobs * upstream[0]).sum()
    if entropy is not None:
        loss = loss + (entropy * upstream[1]).sum()
    loss.backward()
    dist.all_reduce(hidden.grad)
    return {
        "logprobs": logprobs.detach(),
        "entropy": None if entropy is None else entropy.detach(),
        "hidden": hidden.grad,
        "weight": own.grad,
    }


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_equals_the_whole_vocabulary(ranks: RankPool, chunk: int | None, with_entropy: bool) -> None:
    hidden, weight, targets, upstream = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs()
    )
    hidden.requires_grad_()
    weight.requires_grad_()
    logp = (hidden @ weight.T / 0.7).log_softmax(-1)
    logprobs, entropy = logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    loss = (logprobs * upstream[0]).sum() + ((entropy * upstream[1]).sum() if with_entropy else 0.0)
    loss.backward()
    results = ranks.run(divided, 4, chunk, with_entropy, timeout=300)
    close = {"atol": 2e-6, "rtol": 1e-5, "check_dtype": False}
    for result in results:
        torch.testing.assert_close(result["logprobs"], logprobs.detach(), **close)
        torch.testing.assert_close(result["hidden"], hidden.grad, **close)
        if with_entropy:
            torch.testing.assert_close(result["entropy"], entropy.detach(), **close)
        else:
            assert result["entropy"] is None
    torch.testing.assert_close(torch.cat([result["weight"] for result in results]), weight.grad, **close)
