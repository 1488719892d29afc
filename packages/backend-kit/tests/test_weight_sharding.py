"""FSDP shards of a trainer become tensor-parallel shards of a rollout, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from rlcore.engines import WeightBucket
from rlcore_kit.testing.processes import RankPool
from rlcore_kit.weight_transfer import (
    Address,
    ShardRule,
    TransferStats,
    WeightSender,
    open_receiver,
    open_sender,
    shard,
)

RULES = [
    ShardRule("*.o_proj.weight", 1),
    ShardRule("*_proj.weight", 0),
    ShardRule("*_proj.bias", 0),
    ShardRule("embed.weight", 0),
]


def test_shards_joined_are_the_whole() -> None:
    bucket = WeightBucket(
        (
            ("layers.0.q_proj.weight", torch.randn(12, 5).bfloat16()),
            ("layers.0.q_proj.bias", torch.randn(12)),
            ("layers.0.o_proj.weight", torch.randn(5, 12)),
            ("norm.weight", torch.randn(7)),
        )
    )
    for size in (1, 2, 3, 4):
        shards = [dict(shard(bucket, RULES, rank, size).tensors) for rank in range(size)]
        for name, whole in bucket.tensors:
            dim = {"layers.0.o_proj.weight": 1, "norm.weight": None}.get(name, 0)
            parts = [tensors[name] for tensors in shards]
            if dim is None:
                assert all(torch.equal(part, whole) for part in parts)
            else:
                assert torch.equal(torch.cat(parts, dim), whole)
                assert all(part.is_contiguous() and part.shape[dim] == whole.shape[dim] // size for part in parts)
                assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts), "not a view of the whole"


@pytest.mark.parametrize(
    ("shape", "rule", "rank", "size", "reason"),
    [
        ((5, 4), ShardRule("w", 0), 0, 2, r"w of shape \(5, 4\) cannot be cut into 2 equal parts along dimension 0"),
        ((4,), ShardRule("w", 1), 0, 2, "along dimension 1"),
        ((4,), ShardRule("w", 0), 2, 2, r"rank must be in \[0, 2\), not 2"),
    ],
)
def test_what_cannot_be_cut(shape: tuple[int, ...], rule: ShardRule, rank: int, size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        shard(WeightBucket((("w", torch.zeros(shape)),)), [rule], rank, size)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 10)
        self.o_proj = nn.Linear(10, 6, bias=False)
        self.norm = nn.LayerNorm(7)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(22, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(3))


_trainer: dict[str, Any] = {}


def rank() -> int:
    return int(os.environ["RANK"])


def open_trainer(delta: bool) -> Address | None:
    """Both ranks shard the model in the default group; the first one listens."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = Model()
    for layer in model.layers:
        fully_shard(layer)
    _trainer["model"] = fully_shard(model)
    if rank() != 0:
        return None
    _trainer["sender"], address = open_sender(receivers=2, timeout_s=200, bucket_bytes=300, delta=delta)
    return address


def step_and_send(version: int) -> TransferStats | None:
    """Change the weights, gather them bucket by bucket, and give them away; then the default group still works."""
    import torch.distributed as dist

    model = _trainer["model"]
    for parameter in model.parameters():
        parameter.data.mul_(1 + version / 8)

    def buckets() -> Iterator[WeightBucket]:
        for name, parameter in model.named_parameters():
            yield WeightBucket(((name, parameter.full_tensor().detach().bfloat16()),))

    stats = None
    if rank() == 0:
        sender: WeightSender = _trainer["sender"]
        stats = sender.send(buckets(), version)
    else:
        for _ in buckets():
            pass
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    return stats


def receive_shards(address: Address, count: int) -> list[dict[str, torch.Tensor]]:
    receiver = open_receiver(address, rank())
    return [
        {name: t for bucket in receiver.receive() for name, t in shard(bucket, RULES, rank(), 2).tensors}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[RankPool, RankPool]]:
    """Two trainer ranks, two rollouts."""
    pools = RankPool(2), RankPool(2)
    for pool in pools:
        pool.run(rank)  # started before anything waits for it
    yield pools
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("delta", [False, True])
def test_fsdp_shards_to_tensor_parallel_shards(pools: tuple[RankPool, RankPool], delta: bool) -> None:
    trainers, rollouts = pools
    address, _ = trainers.run(open_trainer, delta)
    with ThreadPoolExecutor(1) as executor:
        receiving = executor.submit(rollouts.run, receive_shards, address, 2, timeout=200)
        stats = [trainers.run(step_and_send, version, timeout=200)[0] for version in (1, 2)]
        left, right = receiving.result(400)
    assert [one.transport for one in stats] == ["shm", "shm"]
    expected = Model()
    for version, (ours, theirs) in enumerate(zip(left, right), 1):
        for name, parameter in expected.named_parameters():
            parameter.data.mul_(1 + version / 8)
            whole = parameter.detach().bfloat16()
            if "norm" in name:
                assert torch.equal(ours[name], whole)
                assert torch.equal(theirs[name], whole)
            else:
                dim = 1 if "o_proj" in name else 0
                assert ours[name].shape[dim] == whole.shape[dim] // 2
                assert torch.equal(torch.cat([ours[name], theirs[name]], dim), whole)
