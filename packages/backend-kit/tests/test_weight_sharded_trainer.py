"""A trainer that FSDP shards sends full tensors to two receivers, and its default process group keeps working."""

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
    TransferStats,
    WeightSender,
    open_receiver,
    open_sender,
)


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
    """Shard the model over both ranks in the default group; the first one opens the sender."""
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
    """Change the weights and send them bucket by bucket; then use the default group."""
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


def receive(address: Address, count: int) -> list[dict[str, torch.Tensor]]:
    receiver = open_receiver(address, rank())
    return [{name: t.clone() for bucket in receiver.receive() for name, t in bucket.tensors} for _ in range(count)]


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
def test_receivers_get_full_tensors(pools: tuple[RankPool, RankPool], delta: bool) -> None:
    trainers, rollouts = pools
    address, _ = trainers.run(open_trainer, delta)
    with ThreadPoolExecutor(1) as executor:
        receiving = executor.submit(rollouts.run, receive, address, 2, timeout=200)
        stats = [trainers.run(step_and_send, version, timeout=200)[0] for version in (1, 2)]
        received = receiving.result(400)
    assert [one.transport for one in stats] == ["shm", "shm"]
    expected = Model()
    for version in (1, 2):
        for name, parameter in expected.named_parameters():
            parameter.data.mul_(1 + version / 8)
            for versions in received:
                assert torch.equal(versions[version - 1][name], parameter.detach().bfloat16()), name
